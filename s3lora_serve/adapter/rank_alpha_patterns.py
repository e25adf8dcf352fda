"""Look up the values of rank_pattern and alpha_pattern by module name, matching as PEFT does.

A key matches a module's full name, or the part of it after any of its dots. The first key that
matches wins. Source: PEFT, `get_pattern_key`.

The adapter's owner writes keys as regular expressions. RE2 matches those that are no plain names,
in time linear in the name, whatever the expression. What it does not have is refused:
lookarounds, backreferences, possessive repetitions.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Generic, TypeVar

import re2

from s3lora_serve.errors import ConfigInvalid

MAX_LENGTH = 1024
"""Maximum number of characters in a key. PEFT writes module names as keys, people expressions with
the numbers of up to a hundred layers."""

MAX_EXPRESSION_BYTES = 2**20
"""What RE2 may take for one expression. A list of a hundred layers takes a few kilobytes."""

MAX_KEYS = 2**15
"""Maximum number of keys in one map, equal to the maximum number of modules of an adapter. An
adapter for 1,000 experts with a separate rank for each projection needs 3,000 keys for each
mixture-of-experts layer."""

MAX_FORMS = 400
"""Maximum number of comparisons for one module's name. Plain-name keys that have dots at the same
positions are one form; every other key is a form of its own. 1,000 numbered experts with three
projections in 100 layers have 12 forms."""

T = TypeVar("T")

_NAME = re.compile(r"[\w.-]+", re.ASCII)
_READ_OTHERWISE = "{,", "[:"
"""`a{,2}` and `[[:alpha:]]` mean one thing to Python, which PEFT uses, and another to RE2."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Plain-name keys that have dots at the same positions."""

    length: int
    parts: tuple[slice, ...]  # the parts between the dots
    # The position in the map of the first key with these parts.
    positions: dict[tuple[str, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: tuple[str, ...]) -> "_Form":
        starts = [0, *accumulate(len(part) + 1 for part in parts)]
        ends = [start + len(part) for start, part in zip(starts, parts, strict=False)]
        return cls(ends[-1], tuple(map(slice, starts, ends)))

    def find(self, module: str) -> int | None:
        """The position in the map of the first key of this form that matches."""
        start = len(module) - self.length
        if start < 0 or (start > 0 and module[start - 1] != "."):
            return None
        suffix = module[start:]
        return self.positions.get(tuple(suffix[part] for part in self.parts))


class ModulePatterns(Generic[T]):
    """One map of the configuration. A dot in a key stands for any character, as in PEFT.

    Raises:
        ConfigInvalid: the map has too many keys, or a key is no expression, or one that cannot be
            matched in bounded time.
    """

    def __init__(self, name: str, values: Mapping[str, T]) -> None:
        self._values = tuple(values.values())
        self._forms: dict[tuple[int, ...], _Form] = {}
        self._expressions: list[tuple[int, Any]] = []
        if len(values) > MAX_KEYS:
            raise ConfigInvalid(f"{name} has {len(values)} keys, over {MAX_KEYS}")
        for position, key in enumerate(values):
            if len(key) > MAX_LENGTH:
                raise ConfigInvalid(
                    f"{name} has a key of {len(key)} characters, over {MAX_LENGTH}: {key[:80]!r}"
                )
            if _NAME.fullmatch(key):
                parts = tuple(key.split("."))
                form = self._forms.setdefault(tuple(map(len, parts)), _Form.of(parts))
                form.positions.setdefault(parts, position)
            else:
                self._expressions.append((position, _compiled(name, key)))
            if len(self._forms) + len(self._expressions) > MAX_FORMS:
                raise ConfigInvalid(
                    f"{name} has keys of more than {MAX_FORMS} forms, with {key[:80]!r} one too"
                    " many; module names that have dots at the same places are one form"
                )

    def __len__(self) -> int:
        return len(self._values)

    def get(self, module: str) -> T | None:
        """The value of the first key that matches a module's name."""
        positions = [
            position for form in self._forms.values() if (position := form.find(module)) is not None
        ]
        first = min(positions, default=len(self._values))
        for position, expression in self._expressions:
            if position > first:
                break
            if expression.match(module):
                first = position
                break
        return self._values[first] if first < len(self._values) else None


def _compiled(name: str, key: str) -> Any:
    """The expression of one key, for `match`.

    Raises:
        ConfigInvalid: PEFT could not use it, or it cannot be matched in bounded time.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that later versions may read otherwise
            re.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigInvalid(f"{name} has the key {key[:80]!r}, no expression: {error}") from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_EXPRESSION_BYTES
    try:
        if not key.isascii() or any(each in key for each in _READ_OTHERWISE):
            raise re2.error
        return re2.compile(rf"(?:.*\.)?(?:{key})$", options)
    except re2.error:
        raise ConfigInvalid(
            f"{name} has the key {key[:80]!r}, which cannot be matched in bounded time: write it"
            " without lookarounds, backreferences, large repetitions and [:classes:]"
        ) from None
