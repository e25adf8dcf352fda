"""Preloading: a worker reads, verifies and loads stored copies beside its steps."""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from s3lora_serve.vllm_plugin.threads import use_cores

MAX_PRELOADED = 4
"""Preloaded adapters kept until they are added; an API server decides on two at a time."""


class Preloader:
    """One thread beside the engine's, on any core that this process had at its start."""

    def __init__(self) -> None:
        # vLLM binds its thread, and threads started from it, to the cores that compute.
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._thread = ThreadPoolExecutor(1, "s3lora-load", initializer=self._yield_cores)
        self._loads: OrderedDict[Any, Future[Any]] = OrderedDict()

    def is_done(self, key: Any, work: Callable[[], Any]) -> bool:
        """Whether `work()` has ended; the first call for a key starts it."""
        if key not in self._loads:
            self._loads[key] = self._thread.submit(work)
            if len(self._loads) > MAX_PRELOADED:
                self._loads.popitem(last=False)[1].cancel()
        return self._loads[key].done()

    def take(self, key: Any) -> Any:
        """The result of the work, once; None if it was never started."""
        load = self._loads.pop(key, None)
        return load.result() if load is not None else None

    def _yield_cores(self) -> None:
        use_cores(1)
        if self._cores:
            os.sched_setaffinity(0, self._cores)
