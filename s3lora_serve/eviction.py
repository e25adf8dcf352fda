"""The bound on the store: adapters that nobody serves make room, least recently used first."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from s3lora_serve.errors import StoreFull


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept adapter, as the file system shows it."""

    path: Path
    size: int  # bytes
    last_used: int  # nanoseconds since 1970

    @classmethod
    def of(cls, path: Path) -> "Entry":
        """What is kept in a folder; its time is set whenever it is opened."""
        return cls(path, folder_size(path), path.stat().st_mtime_ns)


def to_evict(
    entries: Collection[Entry], served: Collection[str], size: int, most: int
) -> list[Entry]:
    """The entries that have to go before `size` more bytes may be kept, of `most` in all.

    Raises:
        StoreFull: what is served leaves no room.
    """
    free = [entry for entry in entries if entry.path.name not in served]
    excess = sum(entry.size for entry in entries) + size - most
    if excess > sum(entry.size for entry in free):
        raise StoreFull(f"{size} bytes do not fit: what is served fills store.max_bytes {most}")
    chosen = []
    for entry in sorted(free, key=lambda entry: entry.last_used):
        if excess <= 0:
            break
        excess -= entry.size
        chosen.append(entry)
    return chosen


def move_aside(entries: Collection[Entry], folder: Path) -> list[Path]:
    """Take entries out of the store at once; removing them may then take its time."""
    moved = []
    for entry in entries:
        aside = folder / f"evicted-{entry.path.name}-{time.monotonic_ns()}"
        entry.path.rename(aside)
        moved.append(aside)
    return moved


def folder_size(folder: Path) -> int:
    """Bytes in the files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())
