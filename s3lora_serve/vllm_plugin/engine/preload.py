"""Preloading: a worker reads, verifies and loads stored copies beside its steps."""

import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.threads import use_cores

ABANDONED_SECONDS = 900.0
"""Age at which a preloaded adapter that nobody added is dropped: its API server has ended. Ours:
above any deadline of an API server's, which drops its own."""


@dataclass(slots=True)
class _Preload:
    future: Future[Any]
    started: float
    is_awaited: bool = True


class Preloader:
    """One thread beside the engine's, on any core that this process had at its start.

    API servers bound how much is preloaded at the same time. What one of them awaits is never
    dropped here.
    """

    def __init__(self, on_change: Callable[[int], None] = lambda _: None) -> None:
        """Start no thread yet; `on_change` gets the number of preloads."""
        self._on_change = on_change
        # vLLM binds its thread, and threads started from it, to the cores that compute.
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._thread = ThreadPoolExecutor(1, "s3lora-load", initializer=self._yield_cores)
        self._preloads: OrderedDict[Any, _Preload] = OrderedDict()

    def start(self, key: Any, work: Callable[[], Any], folder: Path) -> str:
        """Start `work()` unless it was started; the name of the file that reports its end.

        The file is created in `folder` once the work has ended, so that nobody has to ask.
        """
        self._drop_abandoned()
        if key not in self._preloads:
            self._preloads[key] = _Preload(self._thread.submit(work), time.monotonic())
            self._on_change(len(self._preloads))
        preload, report = self._preloads[key], folder / f"loaded-{uuid.uuid4().hex}"
        preload.future.add_done_callback(lambda _: _report(preload, report))
        return report.name

    def take(self, key: Any) -> Any:
        """The result of the work, once; None if it was never started."""
        preload = self._pop(key)
        return preload.future.result() if preload is not None else None

    def forget(self, key: Any) -> None:
        """Drop the work and its result, which nobody awaits any more."""
        if (preload := self._pop(key)) is not None:
            preload.is_awaited = False
            preload.future.cancel()

    def _pop(self, key: Any) -> _Preload | None:
        preload = self._preloads.pop(key, None)
        if preload is not None:
            self._on_change(len(self._preloads))
        return preload

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        for key, preload in list(self._preloads.items()):
            if now - preload.started < ABANDONED_SECONDS:
                break  # they are in order of their start
            self.forget(key)

    def _yield_cores(self) -> None:
        use_cores(1)
        if self._cores:
            os.sched_setaffinity(0, self._cores)


def _report(preload: _Preload, report: Path) -> None:
    if not preload.is_awaited:
        return
    try:
        report.touch(mode=0o600)
    except OSError as error:  # the API server's deadline passes
        compat.logger.error("s3lora: no report in %s: %s", report.parent, error.strerror)
