"""Runs work for each base in a process of its own, and says what is done line by line."""

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from tests.runs.evidence.jobs import BASES


def for_each_base(run: Callable[..., None], *more: Any) -> None:
    """Call `run(base, *more)` for every base at once; a failure ends the program afterwards."""
    context = get_context("spawn")
    processes = [context.Process(target=run, args=(base, *more)) for base in BASES]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("the work for a base failed; run again to go on")


def silent(_name: str, _done: int, _total: int) -> None:
    """Show nothing."""


def said(name: str, done: int, total: int) -> None:
    """Print a line where something is done."""
    if done == total:
        print(name, flush=True)
