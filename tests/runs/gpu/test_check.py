"""The GPU check can be carried, runs on what a GPU machine has, and reports what it found."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.gpu import check, report
from tests.runs.gpu.bare_machine import only_its_packages
from tests.runs.gpu.pack import MOST_BYTES, PACK, requirements, size_of
from tests.runs.gpu.reduced_library import MACHINE_CODE, MAGIC, reduce_library

ROOT = Path(__file__).parents[3]
NOT_PINNED = {"distro"}
"""Brought along and not in the pinned environment, where another package replaces it."""


def test_wheels_of_the_pack_have_the_pinned_versions():
    loose = {one for one in requirements() if "==" not in one}
    assert loose == NOT_PINNED
    assert len(requirements()) == len(set(requirements())) > 25


def part(kind, architecture, size):
    """A part of a fat binary: a header of 64 bytes, then its code."""
    head = bytearray(64)
    struct.pack_into("<HHIQ", head, 0, kind, 0, 64, size)
    struct.pack_into("<I", head, 28, architecture)
    return bytes(head) + bytes([architecture % 251]) * size


def binary(*parts):
    body = b"".join(parts)
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_a_reduced_library_keeps_its_length_and_the_code_of_one_architecture(tmp_path):
    wanted = part(MACHINE_CODE, 90, 40)
    source = b"head" + binary(part(MACHINE_CODE, 80, 100), wanted, part(1, 90, 30)) + b"between"
    other = binary(part(MACHINE_CODE, 80, 16))
    (tmp_path / "library").write_bytes(source + other + b"tail")
    cut = reduce_library(tmp_path / "library", tmp_path / "reduced")
    reduced = (tmp_path / "reduced").read_bytes()
    assert len(reduced) == len(source + other) + 4
    assert cut == 164 + 94
    assert reduced[4:].startswith(binary(wanted) + bytes(cut))
    assert reduced.endswith(b"between" + other + b"tail")  # without sm_90, it stays whole


STEP = """
import json, time
print(json.dumps({"so far": 1}), flush=True)
time.sleep(SECONDS)
print(json.dumps({"so far": 2}), flush=True)
raise SystemExit(CODE)
"""


@pytest.mark.parametrize(
    ("seconds", "code", "found"),
    [(0, 0, {"so far": 2}), (0, 3, {"so far": 2}), (60, None, {"so far": 1})],
    ids=["whole", "failing", "out of time"],
)
def test_a_step_leaves_what_it_had_found_however_it_ends(
    monkeypatch, tmp_path, seconds, code, found
):
    (tmp_path / "step.py").write_text(
        STEP.replace("SECONDS", str(seconds)).replace("CODE", str(code))
    )
    started = subprocess.Popen

    def start(command, **more):
        return started([sys.executable, tmp_path / "step.py"], **more)

    monkeypatch.setattr(check, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(check.subprocess, "Popen", start)
    result = check.run_step("machine", 4.0)
    assert (result["status"], result["found"]) == (code, found)


def test_all_steps_fit_into_nine_minutes_and_have_a_section():
    assert check.TOTAL_SECONDS < 540
    assert list(check.STEPS) == list(report.SECTIONS)


def test_a_report_says_what_is_unmeasured_and_what_is_not_whole():
    counts = {"counts": {"passed": 3, "failed": 1}, "failed": {"test_one": "assert 0"}}
    text = report.markdown({
        "device_tests": {"status": 1, "seconds": 9.0, "found": counts, "said": ""},
        "scoring": {"status": None, "seconds": 70.0, "found": None, "said": ""},
    })  # fmt: skip
    assert "3 passed, 1 failed" in text
    assert "failed: `test_one`" in text
    assert "`device_tests` is not whole: status 1" in text
    assert "`scoring`: unmeasured" in text
    assert "`tokens`: unmeasured" in text


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_steps_run_on_what_a_gpu_machine_has_and_the_pack_can_be_carried(tmp_path):
    subprocess.run([sys.executable, "-m", "tests.runs.gpu.pack"], cwd=ROOT, check=True)
    assert size_of(PACK) <= MOST_BYTES
    environment = only_its_packages(tmp_path / "site") | {
        "CHECK_DEVICE": "cpu", "CHECK_SECONDS": "1200", "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "tests/runs/gpu/check.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    results = json.loads((tmp_path / "out" / "check.json").read_text())
    assert {name: one["status"] for name, one in results.items()} == dict.fromkeys(
        check.STEPS, 0
    ), done.stdout
    assert report.markdown(results).count("unmeasured") == 0
