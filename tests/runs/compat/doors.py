"""Run the tests of the doors in one environment and read their outcome."""

import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from tests.runs.compat.environment import FOLDER, clean_variables
from tests.runs.compat.pins import ROOT

TESTS = (
    "test_doors.py",
    "test_mediation.py",
    "test_contract.py",
    "test_requests_without_effect.py",
    "test_architectures.py",
)
OPERATIONS = (
    "test_skipping.py::test_rows_of_ids_for_captured_graphs_give_the_same_bits_and_leave_idle_"
    "requests_alone[1]"
)
"""vLLM's own operations for GPUs, in Triton's interpreter: slow elsewhere, two minutes here."""


@dataclass
class Outcome:
    """Numbers of passed, failed and skipped tests of one run, and names of those not passed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    unhappy: list[str] = field(default_factory=list)


def run(version: str, python: Path) -> Outcome:
    """Run the tests; their output goes to a log beside the environment."""
    report = FOLDER / f"{version}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider"]
    chosen = [str(Path("tests/serving") / name) for name in (*TESTS, OPERATIONS)]
    with (FOLDER / f"{version}.log").open("wb") as log:
        done = subprocess.run(
            [*command, f"--junitxml={report}", "-m", "slow or not slow", *chosen],
            cwd=ROOT, env=clean_variables(), stdout=log, stderr=log,
        )  # fmt: skip
    if not report.exists():
        return Outcome(failed=1, unhappy=[f"pytest ended with {done.returncode}: see {log.name}"])
    return read(report.read_text())


def read(report: str) -> Outcome:
    """Read the outcome from a JUnit report.

    >>> read('<suite><testcase name="a"/><testcase name="b"><failure/></testcase></suite>')
    Outcome(passed=1, failed=1, skipped=0, unhappy=['b'])
    """
    outcome = Outcome()
    # The input is trusted: pytest has just written the report.
    for case in ET.fromstring(report).iter("testcase"):  # noqa: S314
        ends = {part.tag for part in case}
        if ends & {"failure", "error"}:
            outcome.failed += 1
        elif "skipped" in ends:
            outcome.skipped += 1
        else:
            outcome.passed += 1
            continue
        outcome.unhappy.append(str(case.get("name")))
    return outcome
