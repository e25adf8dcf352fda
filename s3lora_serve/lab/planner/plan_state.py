"""What planners know of adapters without a plan: on disk, shared by all planners of a folder."""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from s3lora_serve.errors import Reason
from s3lora_serve.lab.planner.retries import after_failure
from s3lora_serve.plans.folder import plan_name
from s3lora_serve.plans.planner_records import PlannerRecord, read_record

MAX_RECORDS = 10_000
"""Adapters that are remembered: tenants choose how many there are. The oldest are forgotten."""

LEFT_SECONDS = 3600.0
"""Age at which a half-written file is nobody's any more."""


class PlanState:
    """The plans of a folder, and beside it a record and a lock for each adapter without one."""

    def __init__(self, plans: Path, folder: Path, inputs: str) -> None:
        """Create the folder of records. `inputs` is the digest of base, probes and options.

        Raises:
            OSError: it cannot be created.
        """
        self.plans, self._folder, self._inputs = plans, folder, inputs
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)  # servers show what is in it

    def has_plan(self, digest: str) -> bool:
        """Whether a plan lies in the folder."""
        return (self.plans / plan_name(digest)).exists()

    def record(self, digest: str, now: float | None = None) -> PlannerRecord:
        """What is known of an adapter; what was learnt with other inputs is forgotten."""
        found = read_record(self._folder, digest)
        if found is None:
            found = PlannerRecord(time.time() if now is None else now)
            self._write(digest, found)
        return found if found.inputs in ("", self._inputs) else PlannerRecord(found.first_seen)

    def search_file(self, digest: str) -> Path:
        """Where the search for a plan is saved, from which another planner may go on."""
        return self._file(digest, "search")

    @contextmanager
    def lock(self, digest: str) -> Iterator[bool]:
        """Within this context no other planner works on an adapter; False: another one does.

        The system lets go of the lock when the process ends, however it ends.
        """
        file = self._file(digest, "lock")
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _locked(descriptor, file):
                yield False
                return
            try:
                yield True
            finally:
                file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def write_plan(self, digest: str, text: str) -> None:
        """Write a plan whole or not at all, and forget what is known of the adapter.

        Raises:
            OSError: it cannot be written.
        """
        target = self.plans / plan_name(digest)
        part = self.plans / f".{target.name}.{uuid.uuid4().hex}.part"
        try:
            with part.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # a plan that is empty after a power loss would be obeyed
            part.chmod(0o644)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        self.forget(digest)

    def note_failure(self, digest: str, reason: Reason, *, may_pass: bool) -> PlannerRecord:
        """Note that a calibration failed, and when the next one may begin, if one may."""
        before = self.record(digest)
        after = after_failure(before, reason, self._inputs, may_pass=may_pass)
        self._write(digest, after)
        return after

    def forget(self, digest: str) -> None:
        """Remove the record and the saved search of an adapter."""
        for kind in ("json", "search"):
            self._file(digest, kind).unlink(missing_ok=True)

    def prune(self) -> None:
        """Forget the oldest records above MAX_RECORDS, and what killed planners left behind."""
        files = sorted(self._folder.glob("*.json"), key=_age, reverse=True)
        for file in files[: max(0, len(files) - MAX_RECORDS)]:
            self.forget(file.stem)
        for folder in (self._folder, self.plans):
            for part in folder.glob("*.part"):
                if _age(part) > LEFT_SECONDS:
                    part.unlink(missing_ok=True)

    def _write(self, digest: str, record: PlannerRecord) -> None:
        file = self._file(digest, "json")
        part = file.with_suffix(f".{uuid.uuid4().hex}.part")
        part.write_text(json.dumps(asdict(record)))
        part.replace(file)

    def _file(self, digest: str, kind: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.{kind}"


def _locked(descriptor: int, file: Path) -> bool:
    """Whether the lock is ours: on the file that has this name, and not on one that was removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == file.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _age(file: Path) -> float:
    """Seconds since a file was written; 0 if it is gone."""
    with suppress(OSError):
        return time.time() - file.stat().st_mtime
    return 0.0
