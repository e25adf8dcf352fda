"""When the machine itself stands still: a process that only sleeps, and notes when it wakes late.

Virtual machines stop for moments, and with them every process. What a server's client waits then
is not the server's doing. Run as `python -m tests.runs.load.standstill`: it ends with its input,
and writes the moments as JSON.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

SLEEP_SECONDS = 0.005
LATE_SECONDS = 0.05
"""A wake-up that is later than this is noted: far above what two busy cores delay a sleeper."""

Moment = tuple[float, float]
"""Start and end, by the monotonic clock, which all processes of a machine share."""


@contextmanager
def standstills() -> Iterator[list[Moment]]:
    """Watch the machine within this context; the moments are in the list afterwards."""
    found: list[Moment] = []
    command = [sys.executable, "-m", "tests.runs.load.standstill"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield found
    finally:
        output, _ = process.communicate()
        found.extend((start, end) for start, end in json.loads(output))


def overlap(moment: Moment, others: Iterable[Moment]) -> float:
    """Seconds of a moment that lie within others, which do not overlap each other.

    >>> overlap((1.0, 3.0), [(0.0, 1.5), (2.0, 2.25), (4.0, 5.0)])
    0.75
    """
    start, end = moment
    return sum(max(0.0, min(end, late) - max(start, early)) for early, late in others)


def longest(moments: Sequence[Moment]) -> float:
    """Seconds of the longest moment; 0 if there is none."""
    return max((end - start for start, end in moments), default=0.0)


def main() -> None:
    """Watch until the input ends."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    found: list[Moment] = []
    while not ended.is_set():
        started = time.monotonic()
        time.sleep(SLEEP_SECONDS)
        now = time.monotonic()
        if now - started > SLEEP_SECONDS + LATE_SECONDS:
            found.append((started + SLEEP_SECONDS, now))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
