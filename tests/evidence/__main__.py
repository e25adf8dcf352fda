"""`make evidence`: runs the stages that have no result yet, then writes RESULTS.md.

One process for each base, with half of the cores: threads wait for each other more than processes.
"""

import argparse
import os
from collections.abc import Callable
from multiprocessing import get_context
from queue import Empty
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from tests.evidence.adapters import Subject
from tests.evidence.base_model import own_answers
from tests.evidence.results import write_results
from tests.evidence.served import served_result
from tests.evidence.stages import attribution, base_result, ceiling, curves, subject_result

BASES, SEEDS = (0, 1), (0, 1, 2)

Job = Callable[[Callable[[str, int, int], None]], Any]


def subjects(seeds: int) -> list[Subject]:
    """All adapters of the bench, those first that the claims are about."""
    drawn = SEEDS[:seeds]
    kinds = ("20 %", "benign", "harmful", "5 %")
    found = [Subject(kind, base, seed) for kind in kinds for seed in drawn for base in BASES]
    return found + [Subject("20 % attention", 1, seed) for seed in drawn]


def jobs(base: int, chosen: list[Subject]) -> list[Job]:
    """What is to be done for one base, in order. The curves take longest: on base 0 alone."""
    shown = Subject("20 %", base, 0)
    stages = (attribution, ceiling, served_result, *((curves,) if base == 0 else ()))
    found: list[Job] = [lambda progress: base_result(base, progress)]
    for subject in (subject for subject in chosen if subject.base == base):
        found.append(lambda progress, subject=subject: subject_result(subject, progress))
        if subject == shown:
            found += [lambda progress, stage=stage: stage(shown, progress) for stage in stages]
    return found


def run(base: int, chosen: list[Subject], reports: Any) -> None:
    """Do one base's jobs in a process of its own; reports are (base, name, done, total)."""
    quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // len(BASES)))
    todo = jobs(base, chosen)
    for place, job in enumerate(todo):
        job(lambda name, done, total: reports.put((base, name, done, total)))
        reports.put((base, "", place + 1, len(todo)))


def quiet() -> None:
    """The bars of the bench are enough."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m tests.evidence")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of each kind: 1 to 3")
    parser.add_argument("--only-results", action="store_true", help="write RESULTS.md of what is")
    arguments = parser.parse_args()
    quiet()
    chosen = subjects(arguments.seeds)
    if not arguments.only_results:
        _run_all(chosen)
    write_results(chosen)


def _run_all(chosen: list[Subject]) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console()) as bars:
        first = bars.add_task("model and own answers", total=1)
        own_answers(lambda _name, done, total: bars.update(first, completed=done, total=total))
        context = get_context("spawn")
        reports = context.Queue()
        processes = [context.Process(target=run, args=(base, chosen, reports)) for base in BASES]
        tasks = {
            base: (bars.add_task(f"base {base}", total=1), bars.add_task("")) for base in BASES
        }
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) or not reports.empty():
            try:
                base, name, done, total = reports.get(timeout=1)
            except Empty:
                continue
            task = tasks[base][1 if name else 0]
            bars.update(
                task, completed=done, total=total, **({"description": name} if name else {})
            )
            if not name:
                write_results(chosen)
    if failed := [base for base, process in zip(BASES, processes, strict=True) if process.exitcode]:
        raise SystemExit(f"the jobs of base {failed[0]} failed; run again to go on")


if __name__ == "__main__":
    main()
