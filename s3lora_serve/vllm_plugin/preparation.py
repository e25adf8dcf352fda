"""Adapters that a worker reads, verifies and loads beside its steps, until it is to add them."""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from s3lora_serve.vllm_plugin.threads import use_cores

MOST_WAITING = 4
"""Prepared adapters kept until somebody adds them: an API server decides on two at a time."""


class Preparation:
    """One thread beside the engine's, on any core that this process was given at its start."""

    def __init__(self) -> None:
        # vLLM will bind its thread, and with it those it starts, to the cores that compute.
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._thread = ThreadPoolExecutor(1, "s3lora-load", initializer=self._stand_aside)
        self._begun: OrderedDict[Any, Future[Any]] = OrderedDict()

    def is_done(self, key: Any, work: Callable[[], Any]) -> bool:
        """Whether `work()` has ended; it begins when first asked for."""
        if key not in self._begun:
            self._begun[key] = self._thread.submit(work)
            if len(self._begun) > MOST_WAITING:
                self._begun.popitem(last=False)[1].cancel()
        return self._begun[key].done()

    def take(self, key: Any) -> Any:
        """What the work came to, once; None where it was never begun."""
        begun = self._begun.pop(key, None)
        return begun.result() if begun is not None else None

    def _stand_aside(self) -> None:
        use_cores(1)
        if self._cores:
            os.sched_setaffinity(0, self._cores)
