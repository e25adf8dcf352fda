"""Threads beside the server's loop, and the queues in front of them, one for each kind of work.

Loads, dry scans, downloads and the audit log have threads of their own: none waits for another.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from s3lora_serve.vllm_plugin.api.load_queue import LoadQueue
from s3lora_serve.vllm_plugin.threads import use_cores

MAX_SCORING_THREADS = 4
"""Cores that score one adapter, on machines with four times as many cores or more."""

MAX_LOADS = 4
"""Adapters between decision and load at the same time, on machines with 16 cores or more."""

T = TypeVar("T")


def load_places() -> int:
    """Loads at the same time: two at least, so that a slow one does not hold up the next."""
    return max(2, min(MAX_LOADS, (os.cpu_count() or 1) // 4))


def _limit_cores() -> None:
    """Use few cores: idle engines spin on the others, and parallel sums would wait for them."""
    use_cores(min(MAX_SCORING_THREADS, max(1, (os.cpu_count() or 1) // 4)))


def start_in_background(work: Callable[[], object]) -> None:
    """Have work done once. The process waits for its end, so long work calls `stop_at_exit`."""

    def run() -> None:
        _limit_cores()
        with suppress(Exiting):
            work()

    # Not an executor's thread: those are waited for while the main thread still counts as alive.
    threading.Thread(target=run, name="s3lora-background").start()


class Exiting(Exception):
    """The process is about to end."""


def stop_at_exit() -> None:
    """Stop background work if the main thread has ended.

    Raises:
        Exiting: it has.
    """
    if not threading.main_thread().is_alive():
        raise Exiting


class WorkThreads:
    """A number of threads for one kind of work, and the queue for its places."""

    def __init__(
        self, name: str, count: int, on_change: Callable[[int], None] = lambda _: None
    ) -> None:
        self.queue = LoadQueue(count, on_change=on_change)
        self._threads = ThreadPoolExecutor(count, f"s3lora-{name}", initializer=_limit_cores)

    def start(self, work: Callable[[], object]) -> None:
        """Have work done that nobody waits for."""
        self._threads.submit(work)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """The result of the work. If the task is cancelled, the work still goes on to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args))
