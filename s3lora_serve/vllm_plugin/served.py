"""What one API server serves: name, id, admitted copy and verdict of each adapter."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from s3lora_serve.verdict import Verdict
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.desk import Desk

LINGER_SECONDS = 1.0
"""How often to look whether the last request of an adapter is done; one that is just being read
from the wire is with the engine by then."""


@dataclass(frozen=True, slots=True)
class Served:
    """One registered adapter."""

    number: int  # vLLM's id of it
    path: Path  # in the store
    origin: str  # the path that it was registered with
    verdict: Verdict
    time: datetime = field(default_factory=lambda: datetime.now(UTC))


class ServedAdapters:
    """The registered adapters by name, as vLLM's registry has them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._adapters: OrderedDict[str, Served] = OrderedDict()
        self._retiring: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> Served | None:
        """What is served under a name."""
        return self._adapters.get(name)

    def origin(self, name: str) -> str | None:
        """The path that what is served under a name was registered with."""
        adapter = self._adapters.get(name)
        return adapter.origin if adapter else None

    def all(self) -> list[Served]:
        """Everything that is served, in the order of registration."""
        return list(self._adapters.values())

    def add(self, engine: Any, adapter: Served) -> None:
        """Serve an adapter, from now on in the place of what had its name."""
        name = adapter.verdict.name
        before = self._adapters.pop(name, None)
        self._adapters[name] = adapter
        self._desk.recorder.metrics.serve(adapter.verdict)
        if before is not None:
            self._retire(engine, before)

    def remove(self, engine: Any, name: str) -> None:
        """Serve an adapter no longer: not in the metrics, not in the engine, not kept for it."""
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            self._desk.recorder.metrics.withdraw(name)
            self._retire(engine, adapter)

    def _retire(self, engine: Any, adapter: Served) -> None:
        task = asyncio.get_running_loop().create_task(self._retired(engine, adapter))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retired(self, engine: Any, adapter: Served) -> None:
        """Take an adapter out of the engine once its last request is done."""
        current = self._adapters.get(adapter.verdict.name)
        if current is None or current.number != adapter.number:
            await asyncio.sleep(LINGER_SECONDS)
            while compat.has_requests_under_way(engine, adapter.number):
                await asyncio.sleep(LINGER_SECONDS)
            await engine.remove_lora(adapter.number)
        self._desk.store.release(adapter.path)
