"""The adapters that one API server serves: name, id, stored copy and verdict of each."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict
from s3lora_serve.telemetry.audit_event import Copy
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import Experiment
from s3lora_serve.vllm_plugin.api.client import asked_by
from s3lora_serve.vllm_plugin.api.work_threads import WorkThreads
from s3lora_serve.vllm_plugin.api.worker_calls import while_alive
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopy

POLL_SECONDS = 1.0
"""Interval between checks for running requests of an adapter that is to be unloaded. A request that
the server has just received is in the engine after one interval."""


@dataclass(frozen=True)
class SharedModules:
    """The modules of the verdicts on one stored copy, for as long as an adapter refers to them."""

    modules: tuple[ModuleVerdict, ...]


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """One registered adapter."""

    copy: PinnedCopy
    origin: str  # the path that it was registered with
    verdict: Verdict
    experiment: Experiment | None = None  # the settings of its own, if it has any
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: float = field(default_factory=monotonic)  # seconds
    shared: SharedModules | None = None  # those of the verdict

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.verdict.name

    @property
    def path(self) -> Path:
        """The stored copy's."""
        return self.copy.path

    @property
    def adapter_id(self) -> int:
        """The id that the engine knows it by."""
        return self.copy.adapter_id


class ServedAdapters:
    """The registered adapters by name, as vLLM's registry has them."""

    def __init__(self, process: GuardedProcess, audit: WorkThreads) -> None:
        """Serve nothing yet; `audit` is the thread that writes the audit log."""
        self._process = process
        self._audit = audit
        self._adapters: OrderedDict[str, ServedAdapter] = OrderedDict()
        self._modules: WeakValueDictionary[Path, SharedModules] = WeakValueDictionary()
        self._unloading: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> ServedAdapter | None:
        """The adapter that is served under a name."""
        return self._adapters.get(name)

    def origin(self, name: str) -> str | None:
        """The path that the adapter of this name was registered with."""
        adapter = self._adapters.get(name)
        return adapter.origin if adapter else None

    def is_quarantined(self, adapter: ServedAdapter) -> bool:
        """Whether a worker has found that the adapter's copy must not be served."""
        return self._process.store.is_quarantined(adapter.path)

    def all(self) -> list[ServedAdapter]:
        """All served adapters, in the order of registration."""
        return list(self._adapters.values())

    def add(self, engine: Any, adapter: ServedAdapter) -> None:
        """Serve an adapter; it replaces the one that had its name.

        Its verdict is kept without spectra, and its modules once for all names of one stored copy.
        """
        name = adapter.verdict.name
        shared = self._shared(adapter)
        verdict = replace(adapter.verdict, modules=shared.modules)
        adapter = replace(adapter, verdict=verdict, shared=shared)
        before = self._adapters.pop(name, None)
        self._adapters[name] = adapter
        if adapter.experiment is None:
            self._process.events.metrics.serve(adapter.verdict)
        if before is not None:
            if before.path != adapter.path:
                now = Copy(adapter.verdict.digest, adapter.path.name)
                self._report(self._process.events.replaced, before, now)
            self._unload(engine, before)

    def _shared(self, adapter: ServedAdapter) -> SharedModules:
        own, shared = adapter.verdict.modules, self._modules.get(adapter.path)
        # In audit mode workers may object to an adapter under one name: nothing changes there.
        if shared is None or [m.changed for m in shared.modules] != [m.changed for m in own]:
            shared = SharedModules(adapter.verdict.without_spectra().modules)
            self._modules[adapter.path] = shared
        return shared

    def remove(self, engine: Any, name: str) -> None:
        """Stop serving an adapter: remove it from metrics and engine, and unpin its copy."""
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            self._process.events.metrics.withdraw(name)
            self._report(self._process.events.unloaded, adapter)
            self._unload(engine, adapter)

    def _report(self, report: Callable[..., None], adapter: ServedAdapter, *more: Copy) -> None:
        """Report what a request did to an adapter, on the thread of the audit log."""
        told = partial(report, adapter.verdict, adapter.path, *more, asked_by=asked_by())
        self._audit.start(told)

    def _unload(self, engine: Any, adapter: ServedAdapter) -> None:
        task = asyncio.get_running_loop().create_task(self._unload_when_idle(engine, adapter))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload_when_idle(self, engine: Any, adapter: ServedAdapter) -> None:
        """Remove an adapter from the engine after its last request, and unpin its copy."""
        current = self._adapters.get(adapter.verdict.name)
        try:
            if current is None or current.adapter_id != adapter.adapter_id:
                await asyncio.sleep(POLL_SECONDS)
                while compat.has_requests_under_way(engine, adapter.adapter_id):
                    await asyncio.sleep(POLL_SECONDS)
                await while_alive(engine, engine.remove_lora(adapter.adapter_id))
        except Exception as error:  # noqa: BLE001 - the engine has ended, the adapter with it
            compat.logger.warning("s3lora: %r is not removed: %s", adapter.name, error)
        finally:
            self._process.store.unpin(adapter.path)
