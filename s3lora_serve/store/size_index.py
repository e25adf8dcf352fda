"""Sizes of the stored copies, each measured once: a stored copy does not change.

The index is a file with one line for each copy, and may be lost or behind at any time: what it
lacks is measured and added. It is read and written under the store's lock.
"""

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

_LINE = re.compile(r"^([0-9a-f]{64}(?:-\d{1,9})?) (\d{1,18});$", re.MULTILINE)
"""A line without its end is of a process that was killed: its number may lack digits."""

FACTOR = 2
"""The file is written anew when it has so many lines for each copy. Ours: it stays small."""


class SizeIndex:
    """The sizes of one store's copies, shared by its processes."""

    def __init__(self, file: Path, measure: Callable[[str], int]) -> None:
        """Keep the file, and what measures the copy of a name in bytes."""
        self._file = file
        self._measure = measure

    def record(self, name: str, size: int) -> None:
        """Note a copy's size before it gets its name: a copy is never there without one."""
        self._append({name: size})

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """The size in bytes of each of these copies, which are all that the store has."""
        lines = self._lines()
        known = {name: int(size) for name, size in lines}
        found = {name: known[name] for name in names if name in known}
        new = {name: self._measure(name) for name in names if name not in known}
        if len(lines) > FACTOR * (len(names) + 1):
            self._replace(found | new)
        elif new:
            self._append(new)
        return found | new

    def _lines(self) -> list[tuple[str, str]]:
        try:
            return _LINE.findall(self._file.read_text("ascii", "replace"))
        except OSError:
            return []

    def _append(self, sizes: dict[str, int]) -> None:
        with suppress(OSError), self._file.open("a") as file:  # what is lost is measured again
            file.write(_text(sizes))

    def _replace(self, sizes: dict[str, int]) -> None:
        new = self._file.with_suffix(".new")
        with suppress(OSError):
            new.write_text(_text(sizes))
            new.replace(self._file)


def _text(sizes: dict[str, int]) -> str:
    return "".join(f"\n{name} {size};" for name, size in sizes.items())
