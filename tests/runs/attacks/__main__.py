"""`make attacks`: makes what is not there yet, measures it, and writes RESULTS.md."""

import argparse
import os
from multiprocessing import get_context

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from tests.runs.attacks.attacks import ATTACKS, Attacked
from tests.runs.attacks.measuring import attack_result, base_rates
from tests.runs.attacks.results import write_results
from tests.runs.evidence.base_model import aligned_base, benign_answers
from tests.runs.evidence.jobs import BASES, quiet
from tests.runs.evidence.training import DTYPE


def main() -> None:
    """Run the suite, one process for each base."""
    parser = argparse.ArgumentParser(prog="python -m tests.runs.attacks")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each attack on each base")
    parser.add_argument("--only-results", action="store_true", help="write RESULTS.md of what is")
    arguments = parser.parse_args()
    quiet()
    if not arguments.only_results:
        benign_answers(_silent)
        context = get_context("spawn")
        processes = [context.Process(target=run, args=(b, arguments.seeds)) for b in BASES]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a base's attacks failed; run again to go on")
    write_results([each for base in BASES for each in _subjects(base, arguments.seeds)])


def run(base: int, seeds: int) -> None:
    """All attacks on one base, in a process of its own."""
    quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // len(BASES)))
    calibration = CalibrationBase(aligned_base(base, _silent), dtype=DTYPE)
    for attack in ATTACKS:
        base_rates(base, attack.setting, _silent)
    for subject in _subjects(base, seeds):
        attack_result(subject, calibration, _said)


def _subjects(base: int, seeds: int) -> list[Attacked]:
    return [Attacked(attack, base, seed) for seed in range(seeds) for attack in ATTACKS]


def _silent(_name: str, _done: int, _total: int) -> None:
    """Show nothing."""


def _said(name: str, done: int, total: int) -> None:
    """A line where something is done."""
    if done == total:
        print(name, flush=True)


if __name__ == "__main__":
    main()
