"""Steps that start engines start side by side, and measure one after the other."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(os.environ.get("CHECK_TURNS", "."))
"""What is up, and whose turn it is. `check.py` makes it."""

BESIDE = os.environ.get("CHECK_BESIDE", "").split()
"""The steps that run at the same time."""


def note_up(name: str) -> None:
    """Say that the engines of a step, or one engine, have started or never will."""
    (FOLDER / f"{name}.up").touch()


def is_up(name: str) -> bool:
    """Whether that was said."""
    return (FOLDER / f"{name}.up").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    """Look some times a second."""
    while not condition():
        time.sleep(0.2)


@contextmanager
def turn(step: str) -> Iterator[None]:
    """Alone on the machine: all engines of all steps are up, and no other step measures."""
    note_up(step)
    wait_for(lambda: all(is_up(other) for other in BESIDE))
    with (FOLDER / "turn").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
