"""Repeated refusals are counted and do not rotate the audit log's history away."""

import fcntl
import json
import logging
import multiprocessing
import time
from asyncio import CancelledError
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from s3lora_serve import Policy
from s3lora_serve.admission.verdict import Decision, unread_verdict
from s3lora_serve.errors import Reason
from s3lora_serve.telemetry import audit_repeats, events
from s3lora_serve.telemetry.audit_chain import walk
from s3lora_serve.telemetry.audit_event import AuditEvent, Copy, Event, Requester
from s3lora_serve.telemetry.audit_files import readable
from s3lora_serve.telemetry.audit_log import AuditLog
from s3lora_serve.telemetry.audit_repeats import INTERVAL_SECONDS, MAX_CAUSES, Repeats
from s3lora_serve.telemetry.audit_writer import AuditWriter
from s3lora_serve.telemetry.metrics import Metrics
from tests.support.clock import Clock

STORED = Path("/store/0123")
MALLORY = Requester("5e11", "192.0.2.1")


ADMITTED = replace(unread_verdict("", "", Policy()), decision=Decision.ADMITTED)


def admitted(name="acme", **changes):
    return replace(ADMITTED, **({"name": name, "path": f"/adapters/{name}"} | changes))


def refused(name="acme", code="S3LORA-109", **changes):
    rejected = {"decision": Decision.REJECTED, "reason": Reason(code, "no")}
    return admitted(name, **(rejected | changes))


def refusal(name="acme", asked_by=MALLORY, **more):
    return AuditEvent(Event.DECISION, refused(name, **more), door="http", asked_by=asked_by)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def reported(path, monkeypatch):
    """Events with an audit log of the default size."""
    monkeypatch.setattr(events, "Metrics", lambda: Metrics(CollectorRegistry()))
    logger = logging.getLogger("tests.audit")
    logger.setLevel(logging.CRITICAL)
    policy = Policy.model_validate({"audit": {"path": path}})
    return events.AdmissionEvents(policy, "cpu", logger, "0.32.0")


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def writer(path, clock, monkeypatch):
    monkeypatch.setattr("s3lora_serve.telemetry.audit_writer.Repeats", lambda: Repeats(clock))
    return writer_at(path)


def writer_at(path, failed=lambda _: None):
    log = AuditLog(path, "0.32.0", max_bytes=100 * 2**20, keep=5)
    return AuditWriter(log, failed)


def lines(path):
    with readable(path) as files:
        return [json.loads(line) for _, stream, _ in files for line in stream]


def named(path):
    return [(line["adapter"], line["count"]) for line in lines(path)]


def test_12500_refusals_with_long_names_rotate_no_history_away(reported, path):
    """They wrote 600 MB, as much as all files of the default policy hold."""
    reported.decided(admitted("first"), "http")
    for number in range(12_500):
        name = f"{number:05}" + "𝕏" * 4091
        reported.decided(refused(name, path=name), "http")
    with readable(path) as files:
        chain = walk(files)
    assert (chain.files, chain.broken, chain.begins) == (1, 0, None)
    assert path.stat().st_size < 2**14
    assert lines(path)[0]["adapter"] == "first"
    reported._writer.flush(everything=True)
    assert sum(line["count"] for line in lines(path)) == 12_501


def test_the_first_refusal_is_written_at_once_and_each_other_cause_too(writer, path):
    other = Requester("0ther", MALLORY.address)
    scan = AuditEvent(Event.SCAN, refused("scan"), asked_by=MALLORY)
    causes = [refusal("a"), refusal("b", code="S3LORA-301"), refusal("c", asked_by=other), scan]
    for event in causes * 3:
        writer.write(event)
    assert named(path) == [("a", 1), ("b", 1), ("c", 1), ("scan", 1)]
    writer.flush(everything=True)
    assert named(path)[4:] == [("a", 2), ("b", 2), ("c", 2), ("scan", 2)]


@pytest.mark.parametrize(
    "askers",
    [
        [Requester("5e11", f"192.0.2.{n}") for n in range(50)],  # addresses of one key's holder
        [Requester(None, f"2001:db8::{n:x}") for n in range(50)],  # of one client's network
        [Requester(None, "192.0.2.1")] * 50,
        [None] * 50,
    ],
)
def test_a_client_cannot_vary_what_its_refusals_are_counted_by(writer, path, askers):
    for number, asked_by in enumerate(askers):
        writer.write(refusal(f"tenant-{number}", asked_by=asked_by))
    assert named(path) == [("tenant-0", 1)]


@pytest.mark.parametrize("address", ["192.0.2.{}", "::ffff:192.0.2.{}", "2001:db8:0:{}::1", "{}"])
def test_clients_of_other_networks_are_counted_apart(writer, path, address):
    for number in range(1, 6):
        for _ in range(2):
            asked_by = Requester(None, address.format(number))
            writer.write(refusal(str(number), asked_by=asked_by))
    assert named(path) == [(str(number), 1) for number in range(1, 6)]


def test_a_count_says_how_many_since_when_and_what_the_last_one_was(writer, path):
    for name in "abc":
        writer.write(refusal(name))
    writer.flush(everything=True)
    first, count = lines(path)
    assert (count["adapter"], count["path"], count["count"]) == ("c", "/adapters/c", 2)
    assert count["asked_by"] == {"key": MALLORY.key, "address": MALLORY.address}
    assert (count["reason"], count["event"]) == ("S3LORA-109", "decision")
    assert first["time"] <= count["since"] <= count["time"]


def test_a_count_is_written_with_the_next_decision_after_a_minute(writer, path, clock):
    for name in "abc":
        writer.write(refusal(name))
    clock.now += INTERVAL_SECONDS - 1
    writer.write(AuditEvent(Event.DECISION, admitted("early")))
    assert named(path) == [("a", 1), ("early", 1)]
    clock.now += 1
    writer.write(AuditEvent(Event.DECISION, admitted("late")))
    assert named(path)[2:] == [("c", 2), ("late", 1)]


def test_a_count_is_written_in_time_though_nothing_else_happens(path, monkeypatch):
    monkeypatch.setattr(audit_repeats, "INTERVAL_SECONDS", 0.05)
    writer = writer_at(path)
    for name in "abc":
        writer.write(refusal(name))
    deadline = time.monotonic() + 30
    while sum(count for _, count in named(path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(count for _, count in named(path)) == 3


def test_a_cause_that_was_quiet_for_a_minute_is_written_at_once_again(writer, path, clock):
    writer.write(refusal("a"))
    clock.now += INTERVAL_SECONDS
    writer.write(refusal("b"))
    assert named(path) == [("a", 1), ("b", 1)]


def refuse_thrice(path):
    writer = writer_at(Path(path))
    for name in "abc":
        writer.write(refusal(name))


def test_a_count_is_written_when_a_process_ends(path):
    child = multiprocessing.get_context("fork").Process(target=refuse_thrice, args=(path,))
    child.start()
    child.join()
    assert named(path) == [("a", 1), ("c", 2)]


def test_nothing_about_a_served_adapter_is_counted(writer, path):
    auditing = replace(refused(), mode="audit")  # served although enforce would refuse it
    served = [
        AuditEvent(Event.DECISION, admitted(), door="http", asked_by=MALLORY),
        AuditEvent(Event.DECISION, auditing, door="http", stored_copy="0", asked_by=MALLORY),
        AuditEvent(Event.SCAN, admitted(), asked_by=MALLORY),
        AuditEvent(Event.LOAD_FAILED, admitted(), stored_copy="0", failure="cancelled"),
        AuditEvent(Event.REPLACEMENT, admitted(), stored_copy="0"),
        AuditEvent(Event.UNLOAD, admitted(), stored_copy="0"),
        AuditEvent(Event.RELOAD, admitted()),
        AuditEvent(Event.QUARANTINE, refused()),
    ]
    for event in served * 3:
        assert writer.write(event)
    assert [line["event"] for line in lines(path)] == [event.event.value for event in served] * 3


def test_what_workers_refuse_and_audit_mode_serves_is_told_apart(reported, path):
    """Both verdicts are rejected, and both adapters have a stored copy."""
    for name in "abc":
        reported.decided(refused(name), "http", stored=STORED, asked_by=MALLORY)
        reported.decided(refused(name, mode="audit"), "http", stored=STORED, asked_by=MALLORY)
    copies = [(line["adapter"], line["mode"], line["stored_copy"]) for line in lines(path)]
    auditing = [(name, "audit", STORED.name) for name in "abc"]
    assert copies == [("a", "enforce", None), *auditing]


def test_what_audit_mode_does_not_load_is_counted_too(writer, path):
    for name in "abc":
        writer.write(refusal(name, mode="audit"))
    assert named(path) == [("a", 1)]


def test_many_requesters_write_a_bounded_number_of_lines_a_minute(writer, path, clock):
    for minute in range(2):
        clock.now += minute * INTERVAL_SECONDS
        for number in range(2000):
            asked_by = Requester(None, f"10.0.{number // 250}.{number % 250}")
            writer.write(refusal(f"{minute}-{number}", asked_by=asked_by))
    assert len(lines(path)) <= 3 * (MAX_CAUSES + 1)
    writer.flush(everything=True)
    assert sum(line["count"] for line in lines(path)) == 4000
    [several, *_] = [line for line in lines(path) if line["count"] > 1]
    assert several["asked_by"] is None, "a count of several requesters names none of them"


def test_a_refusal_that_cannot_be_written_is_written_later(path, tmp_path):
    folder = tmp_path / "disk"
    failed = []
    writer = writer_at(folder / "log", failed.append)
    assert not writer.write(refusal("a"))
    assert writer.write(refusal("b"))
    assert not writer.write(AuditEvent(Event.DECISION, admitted("lost"), stored_copy="0"))
    assert len(failed) == 2
    folder.mkdir()
    writer.flush(everything=True)
    assert named(folder / "log") == [("b", 2)]


def test_a_stuck_log_is_waited_for_once_however_many_counts_are_due(writer, path, clock):
    for number in range(40):
        asked_by = Requester(f"key-{number // 2}", None)
        writer.write(refusal(str(number), asked_by=asked_by))
    failed = []
    writer._failed = failed.append
    clock.now += INTERVAL_SECONDS
    with path.with_name("audit.jsonl.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer.flush()
    assert len(failed) == 1
    writer.flush(everything=True)
    assert sum(count for _, count in named(path)) == 40


steps = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["109", "301"]), st.integers(0, 40)), max_size=60
)


@given(steps)
def test_each_refusal_has_its_line_or_is_in_one_count(drawn):
    clock = Clock()
    repeats = Repeats(clock)
    found, times = 0, {}

    def written(event):
        times.setdefault(event.cause, []).append(clock.now)
        return event.count

    for asker, code, seconds in drawn:
        clock.now += seconds
        found += sum(map(written, repeats.take()))
        event = refusal(code=f"S3LORA-{code}", asked_by=Requester(str(asker), None))
        if not repeats.count(event):
            found += written(event)
    for one in times.values():
        assert all(b - a >= INTERVAL_SECONDS for a, b in pairwise(one))
    found += sum(event.count for event in repeats.take(everything=True))
    assert found == len(drawn)
    assert repeats.seconds_until_due() is None


def test_failed_loads_replacements_unloads_and_scans_have_lines(reported, path):
    now = Copy("sha256:new", "4567")
    reported.load_failed(admitted(), "http", CancelledError(), stored=STORED, asked_by=MALLORY)
    reported.load_failed(
        admitted(), "resolver", RuntimeError("no slot"), stored=STORED, asked_by=None
    )
    reported.replaced(admitted(digest="sha256:old"), STORED, now, asked_by=MALLORY)
    reported.unloaded(admitted(), STORED, asked_by=MALLORY)
    reported.scanned(refused(), MALLORY)
    left, failed, replaced, unloaded, scanned = lines(path)
    assert (left["event"], left["door"], left["failure"]) == ("load_failed", "http", "cancelled")
    assert left["decision"] == "admitted"
    assert failed["failure"] == "RuntimeError: no slot"
    assert (replaced["digest"], replaced["stored_copy"]) == ("sha256:old", STORED.name)
    assert replaced["replaced_by"] == {"digest": "sha256:new", "stored_copy": "4567"}
    assert (unloaded["event"], unloaded["stored_copy"]) == ("unload", STORED.name)
    assert (scanned["event"], scanned["decision"]) == ("scan", "rejected")
    assert [line["asked_by"] and line["asked_by"]["key"] for line in lines(path)] == [
        MALLORY.key, None, MALLORY.key, MALLORY.key, MALLORY.key,
    ]  # fmt: skip
