"""Counts of repeated refusals: after the first line of a cause, one line a minute for the rest.

Otherwise a client that is refused again and again would rotate the log's history away.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from s3lora_serve.telemetry.audit_event import AuditEvent, Cause

INTERVAL_SECONDS = 60.0
"""Shortest time between two lines of one cause. Ours: fast enough for an alert."""

MAX_CAUSES = 100
"""Causes that are counted apart. Ours: two lines of 4 kB a minute for each are 50 MB an hour.
Beyond it, requesters share causes, of which there are as many as reasons."""

_SEVERAL = "several"


@dataclass(slots=True)
class _Count:
    """The refusals of one cause since its last line."""

    written: float  # when the last line was, in seconds of the clock
    number: int = 0
    since: datetime | None = None
    last: AuditEvent | None = None

    def add(self, event: AuditEvent) -> None:
        self.number += event.count
        self.since = min(self.since or event.time, event.since or event.time)
        # Of a refusal no module is listed, and a verdict's modules take much memory.
        self.last = replace(event, verdict=replace(event.verdict, modules=()))


class Repeats:
    """The refusals of one process that have no line yet. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[Cause, _Count] = {}

    def count(self, event: AuditEvent) -> bool:
        """Whether the event repeats a refusal, and was counted: it needs no line of its own."""
        with self._lock:
            cause = self._cause(event)
            if cause is None:
                return False
            if cause in self._counts:
                self._counts[cause].add(_without_requester(event, cause))
                return True
            self._counts[cause] = _Count(self._clock())
            return False

    def put_back(self, event: AuditEvent) -> None:
        """Count a refusal whose line could not be written."""
        with self._lock:
            if cause := self._cause(event):
                count = self._counts.setdefault(cause, _Count(0))
                count.written = self._clock()
                count.add(_without_requester(event, cause))

    def take(self, *, everything: bool = False) -> list[AuditEvent]:
        """The counts that are due, or all, each as one event; they start again at 0."""
        with self._lock:
            now = self._clock()
            due = {
                cause: count
                for cause, count in self._counts.items()
                if everything or now - count.written >= INTERVAL_SECONDS
            }
            for cause in due:
                if due[cause].number:
                    self._counts[cause] = _Count(now)
                else:
                    del self._counts[cause]
        return [
            replace(count.last, count=count.number, since=count.since)
            for count in due.values()
            if count.last is not None
        ]

    def seconds_until_due(self) -> float | None:
        """Seconds until the next count is due; None if nothing is counted."""
        with self._lock:
            pending = [count.written for count in self._counts.values() if count.number]
            if not pending:
                return None
            return max(0.0, min(pending) + INTERVAL_SECONDS - self._clock())

    def _cause(self, event: AuditEvent) -> Cause | None:
        cause = event.cause
        if cause is None or cause in self._counts or len(self._counts) < MAX_CAUSES:
            return cause
        return _SEVERAL, *cause[1:]


def _without_requester(event: AuditEvent, cause: Cause) -> AuditEvent:
    return replace(event, asked_by=None) if cause[0] == _SEVERAL else event
