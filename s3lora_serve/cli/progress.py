"""How far work with phases is: bars on a terminal, else a line for each phase; standard error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Shown = Callable[..., None]
"""Takes the name of a phase, the work done in it, the whole of it, and perhaps a note."""


@contextmanager
def phase_bars() -> Iterator[Shown]:
    """Within this context, a function that shows how far each phase is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def shown(phase: str, done: int, total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            if note:
                bars.update(tasks[phase], description=f"{phase}: {note}")
            bars.update(tasks[phase], completed=done, total=total)

        yield shown


def _lines(console: Console) -> Shown:
    """Prints a line when a phase begins, one for each note, and one when the phase has ended."""
    begun: dict[str, float] = {}

    def shown(phase: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if phase not in begun:
            begun[phase] = now
            _print(console, f"{phase}: {total} steps")
        if note or done == total:
            told = f": {note}" if note else ""
            _print(console, f"{phase}: {done} of {total}, {now - begun[phase]:.0f} s{told}")

    return shown


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
