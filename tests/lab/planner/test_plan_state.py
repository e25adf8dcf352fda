"""What planners know on disk: locks that a dead process lets go, failures that end."""

import json
import os
import subprocess
import sys
import time

import pytest

from s3lora_serve.errors import GateFailed, Reason, TargetMissed
from s3lora_serve.lab.planner import plan_state
from s3lora_serve.lab.planner.plan_state import PlanState
from s3lora_serve.lab.planner.retries import RETRY_SECONDS, TRIES

DIGEST = "sha256:" + "a" * 64
HOLDER = """
import sys, time
from pathlib import Path
from s3lora_serve.lab.planner.plan_state import PlanState
with PlanState(Path(sys.argv[1]), Path(sys.argv[2]), "inputs").lock(sys.argv[3]) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def state(plans, tmp_path):
    return PlanState(plans, tmp_path / "state", "inputs")


def other(state, plans, tmp_path):
    """Another planner on the same storage."""
    return PlanState(plans, tmp_path / "state", "inputs")


def test_two_planners_never_work_on_one_adapter(state, plans, tmp_path):
    with state.lock(DIGEST) as ours, other(state, plans, tmp_path).lock(DIGEST) as theirs:
        assert (ours, theirs) == (True, False)
    with other(state, plans, tmp_path).lock(DIGEST) as theirs:
        assert theirs


def test_a_killed_planner_holds_no_lock(state, plans, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(plans), str(tmp_path / "state"), DIGEST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        with state.lock(DIGEST) as ours:
            assert not ours
        holder.kill()
        holder.wait()
        with state.lock(DIGEST) as ours:
            assert ours


def test_a_failure_that_may_pass_is_tried_again_a_few_times_and_then_given_up(state):
    reason = Reason.of(GateFailed("the worker died"))
    for number in range(1, TRIES):
        record = state.note_failure(DIGEST, reason, may_pass=True)
        assert not record.has_failed
        assert not record.is_due(time.time())
        assert record.is_due(time.time() + RETRY_SECONDS * 2**number)
    assert state.note_failure(DIGEST, reason, may_pass=True).has_failed
    assert state.record(DIGEST).has_failed


def test_what_is_given_up_is_tried_again_with_other_probes(state, plans, tmp_path):
    state.record(DIGEST, now=100.0)
    state.note_failure(DIGEST, Reason.of(TargetMissed("0.3")), may_pass=False)
    assert state.record(DIGEST).has_failed
    changed = PlanState(plans, tmp_path / "state", "other inputs").record(DIGEST)
    assert not changed.has_failed
    assert changed.first_seen == 100.0


def test_a_plan_is_written_whole_and_its_record_is_forgotten(state, plans, tmp_path):
    state.record(DIGEST)
    state.search_file(DIGEST).write_text("search")
    state.write_plan(DIGEST, "{}")
    assert [path.name for path in plans.iterdir()] == [f"{'a' * 64}.json"]
    assert oct((plans / f"{'a' * 64}.json").stat().st_mode)[-3:] == "644"
    assert list((tmp_path / "state").iterdir()) == []
    assert state.has_plan(DIGEST)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"first_seen": 1, "unknown": 2}'])
def test_a_record_that_was_cut_off_is_begun_anew(state, tmp_path, text):
    state.record(DIGEST, now=5.0)
    [file] = (tmp_path / "state").iterdir()
    file.write_text(text)
    assert state.record(DIGEST, now=7.0).first_seen == 7.0
    assert json.loads(file.read_text())["first_seen"] == 7.0


def test_records_are_bounded_and_leftovers_go(state, plans, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_state, "MAX_RECORDS", 3)
    for number in range(6):
        digest = f"sha256:{number:064x}"
        state.record(digest)
        os.utime(state.search_file(digest).with_suffix(".json"), (number, number))
    old, new = plans / ".old.part", plans / ".new.part"
    for part in (old, new):
        part.write_text("half")
    os.utime(old, (1, 1))
    state.prune()
    kept = sorted(int(path.stem, 16) for path in (tmp_path / "state").glob("*.json"))
    assert kept == [3, 4, 5]
    assert [path.name for path in plans.iterdir()] == [".new.part"]
