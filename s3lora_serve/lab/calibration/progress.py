"""Progress of a calibration: what is called as its phases go on."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called as the work goes on."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """The name of a phase, the work done in it, the whole of it, and what was measured."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


def summed(progress: Callable[..., None]) -> Callable[[int], None]:
    """What takes numbers of prompts that are done, and reports their sum."""
    count = 0

    def done(number: int) -> None:
        nonlocal count
        count += number
        progress(done=count)

    return done
