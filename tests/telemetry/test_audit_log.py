"""The audit log: lines of many writers stay complete and chained, and changes are detected."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import resource
import signal
import stat
import threading
import time
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.telemetry.audit_chain import (
    MAX_BREAKS,
    MAX_READ_BYTES,
    digest_of,
    last_line,
    walk,
)
from s3lora_serve.telemetry.audit_event import AuditEvent, Event
from s3lora_serve.telemetry.audit_files import LOCK_SECONDS, numbered, readable
from s3lora_serve.telemetry.audit_log import AuditLog
from tests.support.verdicts import admitted

NO_LIMIT = 2**40
fork = multiprocessing.get_context("fork")


def verdict(name="acme", path="/adapters/acme"):
    return admitted(name=name, path=path)


def event(name="acme"):
    return AuditEvent(Event.DECISION, verdict(name), door="engine", stored_copy="0" * 64)


def log_at(path, max_bytes=NO_LIMIT, keep=5):
    return AuditLog(path, "0.32.0", max_bytes=max_bytes, keep=keep)


def write(path, names, **bounds):
    for name in names:
        log_at(path, **bounds).record(event(name))


def in_process(work, *arguments):
    """Run in a child process; return its exit code, negative for a signal."""
    child = fork.Process(target=work, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def chain_at(path):
    with readable(path) as files:
        return walk(files)


def chain_of(*contents, sought=()):
    files = [(f"f{i}", io.BytesIO(data), len(data)) for i, data in enumerate(contents)]
    return walk(files, sought)


def verify(*arguments):
    return CliRunner().invoke(app, ["audit", "verify", *map(str, arguments)])


def entries(path):
    with readable(path) as files:
        return [json.loads(line) for _, stream, _ in files for line in stream]


def size_of_a_line(folder):
    write(folder / "measured", ["w0-000", "w0-001"])
    return len((folder / "measured").read_bytes().splitlines(keepends=True)[1])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eight lines in one file."""
    path = tmp_path_factory.mktemp("whole") / "audit.jsonl"
    write(path, [f"adapter-{i}" for i in range(8)])
    return path.read_bytes()


@pytest.fixture(scope="module")
def torn(whole, tmp_path_factory):
    """Eight lines; a crash cut off the fourth."""
    path = tmp_path_factory.mktemp("torn") / "audit.jsonl"
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4])[:-40])
    write(path, [f"adapter-{i}" for i in range(4)])
    return path.read_bytes()


# Writing


def test_a_line_has_the_digest_of_the_line_before(path):
    write(path, ["a", "b", "c"])
    lines = path.read_bytes().splitlines()
    first, second, third = map(json.loads, lines)
    assert first["previous"] is None
    assert second["previous"] == digest_of(lines[0])
    assert third["previous"] == digest_of(lines[1])


def test_log_and_lock_can_be_read_by_their_owner_alone(path):
    write(path, ["a"])
    for file in (path, path.with_name("audit.jsonl.lock")):
        assert file.stat().st_mode & 0o777 == 0o600


def test_lines_of_concurrent_threads_stay_whole_and_chained(path):
    log = log_at(path)

    def work():
        for _ in range(50):
            log.record(event())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chain = chain_at(path)
    assert (chain.lines, chain.broken, chain.notes) == (200, 0, [])


def hundred_lines(path, worker, start, **bounds):
    log = log_at(path, **bounds)
    start.wait()
    for i in range(100):
        log.record(event(f"w{worker}-{i:03}"))


def test_processes_that_rotate_a_shared_log_lose_nothing_and_keep_the_chain(path, tmp_path):
    line, start = size_of_a_line(tmp_path), fork.Event()
    bounds = {"max_bytes": 20 * line, "keep": 30}
    workers = [
        fork.Process(target=hundred_lines, args=(path, worker, start), kwargs=bounds)
        for worker in range(4)
    ]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    chain = chain_at(path)
    assert (chain.lines, chain.files, chain.broken, chain.notes) == (400, 20, 0, [])
    assert chain.begins is None
    names = [entry["adapter"] for entry in entries(path)]
    for worker in range(4):
        mine = [name for name in names if name.startswith(f"w{worker}-")]
        assert mine == [f"w{worker}-{i:03}" for i in range(100)]


def test_the_highest_file_is_dropped_and_no_file_is_over_its_size(path, tmp_path):
    line = size_of_a_line(tmp_path)
    write(path, [f"w0-{i:03}" for i in range(20)], max_bytes=3 * line, keep=2)
    kept = [path, numbered(path, 1), numbered(path, 2)]
    assert all(file.stat().st_size <= 3 * line for file in kept)
    assert not numbered(path, 3).exists()
    chain = chain_at(path)
    assert (chain.lines, chain.broken) == (8, 0)
    assert chain.begins is not None
    assert [entry["adapter"] for entry in entries(path)][-1] == "w0-019"


def test_keeping_no_file_starts_anew_and_carries_the_chain_over(path, tmp_path):
    line = size_of_a_line(tmp_path)
    write(path, ["w0-000", "w0-001"], max_bytes=2 * line, keep=0)
    dropped = path.read_bytes().splitlines()[-1]
    write(path, ["w0-002"], max_bytes=2 * line, keep=0)
    assert not numbered(path, 1).exists()
    [entry] = entries(path)
    assert (entry["adapter"], entry["previous"]) == ("w0-002", digest_of(dropped))
    assert chain_at(path).broken == 0


def test_keeping_fewer_files_than_before_drops_those_beyond(path):
    write(path, "abcdef", max_bytes=1, keep=5)
    assert numbered(path, 5).exists()
    write(path, "g", max_bytes=1, keep=2)
    assert [numbered(path, n).exists() for n in (1, 2, 3, 4, 5)] == [True, True] + [False] * 3
    assert chain_at(path).broken == 0
    write(path, "h", max_bytes=1, keep=0)
    assert not numbered(path, 1).exists()
    assert (chain_at(path).lines, chain_at(path).broken) == (1, 0)


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_a_rotation_that_is_killed_half_way_keeps_the_order_and_the_chain(
    path, monkeypatch, renamed
):
    write(path, "abc", max_bytes=1, keep=5)
    left = renamed

    class Killed(BaseException):
        pass

    rename = type(path).rename

    def until_killed(self, target):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "rename", until_killed)
        with pytest.raises(Killed):
            write(path, "--", max_bytes=1, keep=5)
    write(path, "xyz", max_bytes=1, keep=5)
    names = [entry["adapter"] for entry in entries(path) if entry["adapter"] != "-"]
    assert names in (list("abcxyz"), list("bcxyz"))
    assert chain_at(path).broken == 0


@pytest.mark.parametrize("empty", [True, False])
def test_a_new_file_continues_the_newest_rotated_one_of_any_process(path, empty):
    write(path, "ab")
    path.rename(numbered(path, 1))  # as a writer that is killed during a rotation leaves it
    if empty:
        log_at(path).check()
    write(path, "c")
    assert (chain_at(path).lines, chain_at(path).files, chain_at(path).broken) == (3, 2, 0)


def test_a_link_is_followed_and_its_files_rotate_beside_the_target(path, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    path.symlink_to(disk / "log")
    write(path, "abc", max_bytes=1)
    write(disk / "log", "d", max_bytes=1)
    assert path.is_symlink()
    assert {file.name for file in disk.iterdir()} == {"log", "log.1", "log.2", "log.3", "log.lock"}
    assert {file.name for file in tmp_path.iterdir()} == {"audit.jsonl", "disk"}
    assert (chain_at(path).lines, chain_at(path).broken) == (4, 0)
    assert stat.S_IMODE((disk / "log").stat().st_mode) == 0o600


# Failures of writers


def test_a_lock_that_is_never_released_is_an_error_soon(path):
    write(path, "a")
    with path.with_name("audit.jsonl.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        for attempt in (lambda: write(path, "b"), log_at(path).check):
            with pytest.raises(TimeoutError) as refused:
                attempt()
            assert refused.value.strerror
        assert time.monotonic() - started < 10 * LOCK_SECONDS
    write(path, "c")
    assert chain_at(path).lines == 2


def test_a_child_forked_while_a_line_is_written_does_not_keep_the_lock(path, monkeypatch):
    write_, children = os.write, []

    def fork_and_write(descriptor, data):
        if not children:
            children.append(os.fork())
            if not children[0]:
                time.sleep(60)
                os._exit(0)
        return write_(descriptor, data)

    monkeypatch.setattr(os, "write", fork_and_write)
    try:
        write(path, "ab")
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
    assert chain_at(path).lines == 2


def test_a_lock_file_that_is_deleted_lets_no_two_writers_in(path, monkeypatch):
    lock, flock = path.with_name("audit.jsonl.lock"), fcntl.flock
    taken = []

    def deleted_first(descriptor, operation):
        if not taken:
            lock.unlink()
        taken.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", deleted_first)
    write(path, "a")
    assert lock.exists(), "the next writer must find the lock file that was held"
    assert taken.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 2


def killed_while_writing(path, part):
    whole_write = os.write

    def half_write(descriptor, data):
        whole_write(descriptor, data[:part])
        os.kill(os.getpid(), signal.SIGKILL)

    os.write = half_write
    write(path, ["torn"])


@pytest.mark.parametrize("part", [1, 60, 200, -1])
@pytest.mark.parametrize("max_bytes", [NO_LIMIT, 1])
def test_a_line_torn_by_a_kill_is_kept_noted_and_chained_to(path, part, max_bytes):
    write(path, "ab")
    assert in_process(killed_while_writing, path, part) == -signal.SIGKILL
    left = path.read_bytes().splitlines()[2]
    assert verify(path).exit_code == 0
    write(path, "cd", max_bytes=max_bytes)
    with readable(path) as files:
        lines = [line.removesuffix(b"\n") for _, stream, _ in files for line in stream]
    assert lines[2] == left
    assert json.loads(lines[3])["previous"] == digest_of(left)
    chain = chain_at(path)
    assert (chain.lines, chain.broken) == (5, 0)
    if part == -1 and max_bytes == NO_LIMIT:
        return  # only its newline was missing, and the next writer added it
    [note] = chain.notes
    assert note.place.endswith(":3")
    assert note.text.startswith("torn: cut off while being written")
    assert ("too short to vouch" in note.text) == (0 < part < 86)


def write_for_ever(path):
    while True:
        write(path, ["victim"], max_bytes=5000, keep=100)


def test_a_writer_killed_at_any_moment_leaves_a_chain_that_can_continue(path):
    for _ in range(5):
        child = fork.Process(target=write_for_ever, args=(path,))
        child.start()
        while not numbered(path, 2).exists():
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        write(path, ["after"], max_bytes=5000, keep=100)
        assert chain_at(path).broken == 0


def fill_up(path, room):
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
    try:
        write(path, ["no room"])
    except OSError as error:
        os._exit(error.errno)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_line_that_does_not_fit_on_the_disk_is_cut_off_again_and_raises(path, room):
    write(path, "ab")
    before = path.read_bytes()
    assert in_process(fill_up, path, room) == errno.EFBIG
    assert path.read_bytes() == before
    write(path, "c")
    assert (chain_at(path).lines, chain_at(path).broken) == (3, 0)


def test_what_is_no_regular_file_is_refused_at_once_and_never_renamed(path, tmp_path):
    os.mkfifo(path)
    for odd in (path, tmp_path, tmp_path / "missing" / "log"):
        for attempt in (log_at(odd, max_bytes=1).check, lambda odd=odd: write(odd, "a")):
            with pytest.raises(OSError, match=r"regular|directory") as refused:
                attempt()
            assert refused.value.strerror
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_the_last_line_of_a_huge_file_is_found_from_its_end(path):
    with path.open("wb") as file:
        file.truncate(2**36)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"x" * 100_000)
    with path.open("rb") as file:
        assert last_line(file.fileno()) == (b"x" * 100_000, False)
    with path.open("wb") as file:
        file.truncate(2 * MAX_READ_BYTES + 2**20)
    with path.open("rb") as file, pytest.raises(OSError, match="no audit log"):
        last_line(file.fileno())


# Verification


def test_a_line_edited_in_the_middle_breaks_the_chain(whole):
    chain = chain_of(whole.replace(b"adapter-3", b"adapter-X"))
    [found] = chain.breaks
    assert found.place == "f0:5"
    assert "does not follow f0:4: that was edited" in found.text


def test_a_line_made_unreadable_is_named_itself(whole):
    lines = whole.splitlines(keepends=True)
    chain = chain_of(whole.replace(lines[3], b"nothing\n"))
    assert [found.place for found in chain.breaks] == ["f0:4", "f0:4"]
    assert all("edited" in found.text for found in chain.breaks)
    assert chain.notes == []


def test_a_line_removed_in_the_middle_breaks_the_chain(whole):
    lines = whole.splitlines(keepends=True)
    [found] = chain_of(b"".join(lines[:3] + lines[4:])).breaks
    assert found.place == "f0:4"
    assert "removed" in found.text


def test_lines_that_were_swapped_or_repeated_are_distinguished_from_edited_ones(whole):
    lines = whole.splitlines(keepends=True)
    swapped = chain_of(b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    assert [found.place for found in swapped.breaks] == ["f0:4", "f0:5", "f0:6"]
    assert all("lines moved" in found.text for found in swapped.breaks)
    repeated = chain_of(whole + lines[2])
    assert [found.text for found in repeated.breaks] == ["follows f0:2, not f0:8: lines moved"]


def test_a_line_without_a_digest_breaks_the_chain(whole):
    for stray in (b'{"adapter":"mine"}\n', b'{"previous":null}\n'):
        [found] = chain_of(whole + stray).breaks
        assert found.place == "f0:9"
        assert "carries no digest" in found.text


def test_the_chain_reaches_across_files(whole):
    lines = whole.splitlines(keepends=True)
    older, newer = b"".join(lines[:4]), b"".join(lines[4:])
    assert chain_of(older, newer).broken == 0
    assert chain_of(older, b"", newer).broken == 0
    [found] = chain_of(b"".join(lines[:3]), newer).breaks
    assert found.place == "f1:1"
    assert "does not follow f0:3" in found.text
    assert chain_of(newer, older).broken


def test_the_oldest_line_may_follow_one_that_was_dropped(whole):
    lines = whole.splitlines(keepends=True)
    chain = chain_of(b"".join(lines[3:]))
    assert chain.broken == 0
    assert chain.begins == digest_of(lines[2].rstrip())
    assert chain_of(whole).begins is None


def test_a_cut_off_tail_is_noticed_against_a_noted_digest(whole):
    lines = whole.splitlines(keepends=True)
    noted = chain_of(whole).ends
    assert chain_of(whole, sought=[noted]).found == {noted}
    cut = chain_of(b"".join(lines[:-1]), sought=[noted])
    assert (cut.broken, cut.found) == (0, set())
    dropped = digest_of(lines[-2].rstrip())
    rotated = chain_of(lines[-1], sought=[dropped, noted])
    assert rotated.found == {dropped, noted}, "the first kept line contains the digest of the last"


def test_only_a_first_line_without_a_line_before_it_is_the_first_ever_written(whole):
    lines = whole.splitlines(keepends=True)
    assert chain_of(whole).from_start
    assert chain_of(lines[0][:-40] + b"\n").from_start, "torn after its digest"
    for rest in (b"".join(lines[1:]), lines[1][:-40] + b"\n", lines[0][:5] + b"\n", b"{}\n", b""):
        assert not chain_of(rest).from_start


def test_breaks_beyond_the_first_hundred_are_counted():
    chain = chain_of(b'{"previous":null}\n' * (MAX_BREAKS + 50))
    assert (len(chain.breaks), chain.broken) == (MAX_BREAKS, MAX_BREAKS + 49)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"1" * 5000 + b"\n", b"null\n[]\n"],
)
def test_no_content_raises(data):
    assert chain_of(data).lines == data.count(b"\n")
    assert bool(chain_of(data).broken) == bool(data)


@given(st.data())
def test_any_byte_edited_inside_is_noticed(whole, torn, data):
    content = data.draw(st.sampled_from([whole, torn]))
    inside = content.rindex(b"\n", 0, -1)
    place, change = data.draw(st.integers(0, inside)), data.draw(st.integers(1, 255))
    edited = bytearray(content)
    edited[place] ^= change
    assert chain_of(bytes(edited)).broken


@given(st.data())
def test_any_byte_edited_anywhere_is_noticed_against_a_noted_digest(whole, data):
    place = data.draw(st.integers(0, len(whole) - 2))
    edited = bytearray(whole)
    edited[place] ^= data.draw(st.integers(1, 255))
    chain = chain_of(bytes(edited), sought=[chain_of(whole).ends])
    assert chain.broken or not chain.found


@given(st.data())
def test_lines_removed_or_swapped_inside_are_noticed(whole, torn, data):
    lines = data.draw(st.sampled_from([whole, torn])).splitlines(keepends=True)
    one, other = sorted(data.draw(st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True)))
    if data.draw(st.booleans()):
        lines[one], lines[other] = lines[other], lines[one]
    else:
        one, other = max(one, 1), min(other, 7)
        del lines[one : max(other, one + 1)]
    cut = data.draw(st.integers(0, len(lines)))
    parts = b"".join(lines[:cut]), b"".join(lines[cut:])
    assert chain_of(*parts).broken


# The command


def test_verify_says_what_there_is_and_exits_with_zero_on_a_whole_log(path):
    write(path, "abc", max_bytes=1)
    done = verify(path)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"whole: {path}, lines: 3, files: 3")
    times = [entry["time"] for entry in entries(path)]
    assert f"{times[0]} to {times[-1]}" in done.stdout
    assert f"last line: {digest_of(path.read_bytes().rstrip())}" in done.stdout


def test_verify_names_file_and_line_and_exits_with_one_on_a_broken_log(path):
    write(path, "abc", max_bytes=1)
    rotated = numbered(path, 1)
    rotated.write_bytes(rotated.read_bytes().replace(b'"adapter":"b"', b'"adapter":"B"'))
    done = verify(path)
    assert done.exit_code == 1
    assert done.stdout.startswith("broken: ")
    assert f"{path}:1: does not follow {rotated}:1" in done.stdout


def test_the_first_word_says_that_lines_were_rotated_away_or_that_there_is_none(path):
    write(path, "abc", max_bytes=1, keep=1)
    done = verify(path)
    assert done.exit_code == 0
    assert done.stdout.startswith("incomplete: ")
    path.write_bytes(b"")
    numbered(path, 1).unlink()
    assert verify(path).stdout.startswith("empty: ")
    assert verify(path, "--since", "2026-03-02").exit_code == 1


def test_verify_fails_if_history_back_to_a_line_or_time_is_gone(path):
    write(path, "abcd")
    digests = [digest_of(line) for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[2:]))
    first = entries(path)[0]["time"]
    before = (datetime.fromisoformat(first) - timedelta(milliseconds=1)).isoformat()
    for kept in (*digests[1:], first, first.replace("Z", "+00:00"), "2999-01-01"):
        assert verify(path, "--since", kept).exit_code == 0, kept
    for gone in (digests[0], before, "2026-03-02", "2026-03-02T08:11+02:00"):
        done = verify(path, "--since", gone)
        assert done.exit_code == 1, gone
        assert f"the first kept line is of {first}" in done.stdout
    for no_point in ("yesterday", "sha256:abc", ""):
        assert verify(path, "--since", no_point).exit_code == 2


def test_verify_fails_without_the_line_that_is_expected(path):
    write(path, "abc")
    noted = digest_of(path.read_bytes().splitlines()[1])
    assert verify(path, "--expect", noted).exit_code == 0
    done = verify(path, "--expect", digest_of(b"another"))
    assert done.exit_code == 1
    assert "expected:" in done.stdout
    assert verify(path, "--expect", "sha256:abc").exit_code == 2


def test_verify_exits_with_two_on_what_cannot_be_read(path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for odd in (path, tmp_path, tmp_path / "pipe"):
        done = verify(odd)
        assert done.exit_code == 2, odd
        assert str(odd) in done.stderr


def test_verify_reads_a_copy_that_has_no_lock_and_makes_none(path, tmp_path):
    write(path, "ab")
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    assert verify(copy).exit_code == 0
    assert not (tmp_path / "copy.lock").exists()


def test_verify_blocks_no_writer_and_reads_one_snapshot(path):
    write(path, "ab", max_bytes=1)
    with readable(path) as files:
        write(path, "cd", max_bytes=1, keep=0)
        chain = walk(files)
    assert (chain.lines, chain.broken) == (2, 0)
