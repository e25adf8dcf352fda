"""rank_pattern and alpha_pattern: values by module name, matched as PEFT matches them.

A key matches a module's name, or what follows one of the dots in it; the first key that matches
wins. Source: PEFT, `get_pattern_key`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, TypeVar

from s3lora_serve.errors import ConfigInvalid

MAX_LENGTH = 128
"""Characters of a key; PEFT writes module names there."""

MAX_KEYS = 2**15
"""Keys of one map: as many as an adapter has modules at most. One of 1,000 experts with a rank for
each projection of its own needs 3,000 for each layer of its kind."""

MAX_FORMS = 400
"""Comparisons that one module's name costs at the worst. Keys that are plain names and have dots at
the same places are one form; every other key is a form of its own. 1,000 numbered experts with
three projections in 100 layers have 12."""

T = TypeVar("T")

_NAME = re.compile(r"[\w.-]+", re.ASCII)
_SAFE = re.compile(r"[\w.\-|\\^$]*[*+]?[\w.\-|\\^$]*", re.ASCII)
"""Keys are regular expressions of the adapter's owner: no groups and at most one repetition, so
that matching a name costs its length squared at the worst."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Keys that are plain names and have dots at the same places."""

    length: int
    parts: tuple[slice, ...]  # what stands between the dots
    places: dict[tuple[str, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: tuple[str, ...]) -> "_Form":
        starts = [0, *accumulate(len(part) + 1 for part in parts)]
        ends = [start + len(part) for start, part in zip(starts, parts, strict=False)]
        return cls(ends[-1], tuple(map(slice, starts, ends)))

    def find(self, module: str) -> int | None:
        """The place of the first key of this form that matches."""
        start = len(module) - self.length
        if start < 0 or (start > 0 and module[start - 1] != "."):
            return None
        suffix = module[start:]
        return self.places.get(tuple(suffix[part] for part in self.parts))


class ModulePatterns(Generic[T]):
    """One map of the configuration; a dot in a key stands for any character, as in PEFT.

    Raises:
        ConfigInvalid: too many keys, or one that is neither a name nor a simple expression.
    """

    def __init__(self, name: str, values: Mapping[str, T]) -> None:
        self._values = tuple(values.values())
        self._forms: dict[tuple[int, ...], _Form] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        if len(values) > MAX_KEYS:
            raise ConfigInvalid(f"{name} has {len(values)} keys, over {MAX_KEYS}")
        for place, key in enumerate(values):
            if len(key) > MAX_LENGTH or not _SAFE.fullmatch(key):
                raise ConfigInvalid(f"{name} has the key {key[:80]!r}, expected a module name")
            if _NAME.fullmatch(key):
                parts = tuple(key.split("."))
                form = self._forms.setdefault(tuple(map(len, parts)), _Form.of(parts))
                form.places.setdefault(parts, place)
            else:
                self._expressions.append((place, _compiled(name, key)))
            if len(self._forms) + len(self._expressions) > MAX_FORMS:
                raise ConfigInvalid(
                    f"{name} has keys of more than {MAX_FORMS} forms, with {key[:80]!r} one too"
                    " many; module names that have dots at the same places are one form"
                )

    def __len__(self) -> int:
        return len(self._values)

    def get(self, module: str) -> T | None:
        """The value of the first key that matches a module's name."""
        places = [
            place for form in self._forms.values() if (place := form.find(module)) is not None
        ]
        first = min(places, default=len(self._values))
        for place, expression in self._expressions:
            if place > first:
                break
            if expression.match(module):
                first = place
                break
        return self._values[first] if first < len(self._values) else None


def _compiled(name: str, key: str) -> re.Pattern[str]:
    try:
        re.compile(key)
        return re.compile(rf"(?:.*\.)?(?:{key})$")
    except (re.error, RecursionError):
        raise ConfigInvalid(f"{name} has the key {key[:80]!r}: no pattern") from None
