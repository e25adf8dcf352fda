"""Bars on standard error for work that has phases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def phase_bars() -> Iterator[Any]:
    """Within this context, a function that shows how far each phase is.

    It takes the name of a phase, the work done in it, the whole of it, and perhaps a note.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def shown(phase: str, done: int, total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            if note:
                bars.update(tasks[phase], description=f"{phase}: {note}")
            bars.update(tasks[phase], completed=done, total=total)

        yield shown
