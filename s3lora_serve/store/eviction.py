"""Eviction: the least recently used copies that no process serves make room for new ones."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from s3lora_serve.errors import StoreFull


@dataclass(frozen=True, slots=True)
class Candidate:
    """One stored copy, as the file system shows it."""

    path: Path
    size: int  # bytes
    last_used: int  # nanoseconds since 1970

    @classmethod
    def of(cls, path: Path, size: int) -> "Candidate":
        """A stored copy of known size, and its time, which is set whenever the copy is opened."""
        return cls(path, size, path.stat().st_mtime_ns)


def choose_evicted(
    candidates: Collection[Candidate], served: Collection[str], size: int, max_bytes: int
) -> list[Candidate]:
    """The copies to evict so that `size` more bytes fit within `max_bytes` in all.

    Raises:
        StoreFull: the served copies leave no room.
    """
    free = [candidate for candidate in candidates if candidate.path.name not in served]
    excess = sum(candidate.size for candidate in candidates) + size - max_bytes
    if excess > sum(candidate.size for candidate in free):
        raise StoreFull(
            f"{size} bytes do not fit: what is served fills store.max_bytes {max_bytes}"
        )
    chosen = []
    for candidate in sorted(free, key=lambda candidate: candidate.last_used):
        if excess <= 0:
            break
        excess -= candidate.size
        chosen.append(candidate)
    return chosen


def move_aside(candidates: Collection[Candidate], folder: Path) -> list[Path]:
    """Move copies out of the store with one rename each; deleting the files may follow later."""
    moved = []
    for candidate in candidates:
        aside = folder / f"evicted-{candidate.path.name}-{time.monotonic_ns()}"
        candidate.path.rename(aside)
        moved.append(aside)
    return moved


def folder_size(folder: Path) -> int:
    """Size in bytes of all files under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
