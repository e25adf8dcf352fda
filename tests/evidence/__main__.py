"""`make evidence`: runs the stages that have no result yet, then writes RESULTS.md."""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from tests.evidence.adapters import Subject
from tests.evidence.results import write_results
from tests.evidence.served import served_result
from tests.evidence.stages import attribution, base_result, ceiling, curves, subject_result

BASES, SEEDS = (0, 1), (0, 1, 2)


def subjects(seeds: int) -> list[Subject]:
    """All adapters of the bench, those first that the claims are about."""
    drawn = SEEDS[:seeds]
    found = [Subject("20 %", base, seed) for seed in drawn for base in BASES]
    for kind in ("benign", "harmful", "5 %"):
        found += [Subject(kind, base, seed) for seed in drawn for base in BASES]
    return found + [Subject("20 % attention", 0, seed) for seed in drawn]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m tests.evidence")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of each kind: 1 to 3")
    parser.add_argument(
        "--base", type=int, choices=BASES, help="only this base, beside another run"
    )
    parser.add_argument("--only-results", action="store_true", help="write RESULTS.md of what is")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    chosen = subjects(arguments.seeds)
    bases = BASES if arguments.base is None else (arguments.base,)
    todo = [subject for subject in chosen if subject.base in bases]
    if not arguments.only_results:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=Console()) as bars:
            whole = bars.add_task("evidence", total=len(bases) + len(todo) + 4 * len(bases))
            phase = bars.add_task("", total=1)

            def progress(name: str, done: int, total: int) -> None:
                bars.update(phase, description=name, completed=done, total=total)

            for base in bases:
                base_result(base, progress)
                bars.advance(whole)
            shown = [Subject("20 %", base, 0) for base in bases]
            for subject in todo:
                subject_result(subject, progress)
                bars.advance(whole)
                if subject in shown:
                    for stage in (attribution, ceiling, curves, served_result):
                        stage(subject, progress)
                        bars.advance(whole)
                write_results(chosen)
    write_results(chosen)


if __name__ == "__main__":
    main()
