"""Writes events to the audit log from any thread, with repeated refusals as counts."""

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.util import Finalize

from s3lora_serve.telemetry.audit_event import AuditEvent
from s3lora_serve.telemetry.audit_log import AuditLog
from s3lora_serve.telemetry.audit_repeats import Repeats

_EXIT_PRIORITY = 100  # any: the log depends on no other finalizer


class AuditWriter:
    """The audit log of one process. Counts are written when they are due, and at its end."""

    def __init__(self, log: AuditLog, failed: Callable[[OSError], None]) -> None:
        """Write to `log`; `failed` hears of each line that could not be written."""
        self._log = log
        self._failed = failed
        self._repeats = Repeats()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        # Not atexit: processes that multiprocessing forks end without it.
        Finalize(None, self.flush, kwargs={"everything": True}, exitpriority=_EXIT_PRIORITY)

    def write(self, event: AuditEvent) -> bool:
        """Write or count an event; False if it could not be written."""
        self.flush()
        written = self._repeats.count(event) or self._append(event)
        if not written:
            self._repeats.put_back(event)
        self._start_timer()
        return written

    def flush(self, *, everything: bool = False) -> None:
        """Write the counts that are due, or all. What cannot be written stays counted."""
        events = self._repeats.take(everything=everything)
        for number, event in enumerate(events):
            if not self._append(event):
                for left in events[number:]:  # a stuck log makes each attempt wait
                    self._repeats.put_back(left)
                return

    def _append(self, event: AuditEvent) -> bool:
        try:
            self._log.record(event)
        except OSError as problem:
            self._failed(problem)
            return False
        return True

    def _start_timer(self) -> None:
        with self._lock:
            seconds = self._repeats.seconds_until_due()
            if seconds is None or self._timer is not None:
                return
            timer = threading.Timer(seconds, self._on_time)
            timer.daemon = True  # the process does not wait for it: its end flushes too
            with suppress(RuntimeError):  # no thread can start: the next event flushes
                timer.start()
                self._timer = timer

    def _on_time(self) -> None:
        with self._lock:
            self._timer = None
        self.flush()
        self._start_timer()
