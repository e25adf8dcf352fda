"""Memory, open files and threads of a server's processes, sampled while it runs."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class Sample:
    """One measurement of all processes of a session."""

    at: float  # seconds, monotonic
    megabytes: float  # resident, without shared memory
    files: int
    threads: int


@dataclass
class Watch:
    """Samples in the background between entering and leaving the context."""

    session: int
    samples: list[Sample] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.samples.append(measure(self.session))

    def growth(self) -> dict[str, tuple[float, float]]:
        """Means of each figure early (second quarter of the run) and late (last quarter)."""
        quarter = max(len(self.samples) // 4, 1)
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        names = ("megabytes", "files", "threads")
        return {name: (_mean(early or late, name), _mean(late, name)) for name in names}


def _mean(samples: list[Sample], figure: str) -> float:
    return sum(getattr(sample, figure) for sample in samples) / max(len(samples), 1)


def measure(session: int) -> Sample:
    """Sum over the processes of a session."""
    memory, files, threads = 0.0, 0, 0
    for process in processes(session):
        try:
            rollup = (process / "smaps_rollup").read_text()
            private = [line.split() for line in rollup.splitlines() if line.startswith("Private_")]
            memory += sum(int(parts[1]) for parts in private) / 1024
            files += len(list((process / "fd").iterdir()))
            threads += len(list((process / "task").iterdir()))
        except OSError:  # it ended meanwhile
            continue
    return Sample(time.monotonic(), memory, files, threads)


def processes(session: int) -> list[Path]:
    """/proc folders of a session's processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            found.append(folder)
    return found
