"""Match the policy's globs: `*` and `?` do not match `/`, `**` does.

A text is read once. The places of the glob that the text so far leads to are the bits of one
number, so each character costs the same few operations, whatever the glob: tenants choose names
and paths, and a search that goes back could be made to take years.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from pydantic import Field

MAX_GLOB = 4096
"""Characters of a glob. Ours: the longest path has as many."""

GlobText = Annotated[str, Field(max_length=MAX_GLOB)]
"""A glob in a policy."""


def glob_matches(pattern: str, text: str) -> bool:
    """Whether the whole of `text` matches `pattern`.

    >>> glob_matches("acme/*", "acme/support"), glob_matches("acme/*", "acme/eu/support")
    (True, False)
    """
    glob = _compiled(pattern)
    places = 1
    for character in text:
        led_on = (places & glob.led_on_by.get(character, glob.led_on_by_others)) << 1
        places = led_on | places & (glob.kept_by_slash if character == "/" else glob.kept)
        if not places:
            return False
    return bool(places & glob.end)


def selects(globs: Iterable[str], module: str) -> bool:
    """Whether one of the globs matches a module's projection or its full name."""
    projection = module.rpartition(".")[2]
    return any(glob_matches(glob, projection) or glob_matches(glob, module) for glob in globs)


@dataclass(frozen=True, slots=True)
class _Glob:
    """The places of a glob as bits: before its first literal or `?`, the next one, …, the end."""

    led_on_by: Mapping[str, int]  # places from which a character of the glob leads to the next
    led_on_by_others: int  # … from which any other character does: those before a `?`
    kept: int  # places with a star: characters but `/` stay there
    kept_by_slash: int  # places with a `**`
    end: int


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> _Glob:
    literals: dict[str, int] = {}
    question_marks = stars = double_stars = 0
    place = 1
    previous = ""
    for character in pattern:
        if character == "*":
            stars |= place
            if previous == "*":
                double_stars |= place
        elif character == "?":
            question_marks |= place
            place <<= 1
        else:
            literals[character] = literals.get(character, 0) | place
            place <<= 1
        previous = character
    led_on_by = {c: places | question_marks for c, places in literals.items()}
    led_on_by["/"] = literals.get("/", 0)
    return _Glob(led_on_by, question_marks, stars, double_stars, end=place)
