"""`make attacks`: makes what is not there yet, measures it, and writes RESULTS.md."""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from tests.runs.attacks.attacks import ATTACKS, Attacked
from tests.runs.attacks.measuring import attack_result, base_rates
from tests.runs.attacks.processes import for_each_base, said, silent
from tests.runs.attacks.results import write_results
from tests.runs.evidence.base_model import aligned_base, benign_answers
from tests.runs.evidence.jobs import BASES, quiet, settle_in
from tests.runs.evidence.training import DTYPE


def main() -> None:
    """Run the suite, one process for each base."""
    parser = argparse.ArgumentParser(prog="python -m tests.runs.attacks")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each attack on each base")
    parser.add_argument("--only-results", action="store_true", help="write RESULTS.md of what is")
    arguments = parser.parse_args()
    quiet()
    if not arguments.only_results:
        benign_answers(silent)
        for_each_base(run, arguments.seeds)
    write_results([each for base in BASES for each in _subjects(base, arguments.seeds)])


def run(base: int, seeds: int) -> None:
    """All attacks on one base, in a process of its own."""
    settle_in()
    calibration = CalibrationBase(aligned_base(base, silent), dtype=DTYPE)
    for attack in ATTACKS:
        base_rates(base, attack.setting, silent)
    for subject in _subjects(base, seeds):
        attack_result(subject, calibration, said)


def _subjects(base: int, seeds: int) -> list[Attacked]:
    return [Attacked(attack, base, seed) for seed in range(seeds) for attack in ATTACKS]


if __name__ == "__main__":
    main()
