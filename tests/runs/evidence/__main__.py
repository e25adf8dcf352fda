"""`make evidence`: runs the stages that have no result yet, then writes RESULTS.md.

One process for each base, with half of the cores: threads wait for each other more than processes.
"""

import argparse
import os
from multiprocessing import get_context
from queue import Empty

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.runs.evidence.adapters import Subject
from tests.runs.evidence.base_model import benign_answers
from tests.runs.evidence.jobs import BASES, SEEDS, quiet, run, subjects
from tests.runs.evidence.results import write_results


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m tests.runs.evidence")
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
        first = bars.add_task("model and its own data", total=1)
        benign_answers(lambda _name, done, total: bars.update(first, completed=done, total=total))
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
