"""Loads of stored copies in a worker: which copy a request means, read now or beside the steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected, GateFailed, Reason, StoreDamaged
from s3lora_serve.store.stored_copy import StoredCopy, open_stored_copy
from s3lora_serve.vllm_plugin import compat, patches
from s3lora_serve.vllm_plugin.engine.enforcement import enforce
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel
from s3lora_serve.vllm_plugin.engine.preload import Preloader
from s3lora_serve.vllm_plugin.engine.worker_admission import WorkerAdmission
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.threads import GiveWay

logger = compat.logger


@dataclass(frozen=True, slots=True)
class StoredLoad:
    """The result of loading a stored copy."""

    stored: StoredCopy | None
    result: Any  # vLLM's LoRAModel, or the AdapterRejected that says why there is none
    seconds: float


class StoredLoads:
    """Opens stored copies and has vLLM load them. Nothing here raises."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self._worker_admission = WorkerAdmission(process)
        self._preloader = Preloader(lambda n: process.events.metrics.set_preloads(n))

    def preload(
        self,
        model: WorkerModel,
        name: str,
        path: str,
        adapter_id: int,
        *,
        folder: Path,
        beside_requests: bool,
    ) -> str:
        """Start reading a stored copy, so that it can be added without delay.

        It is read beside the engine's steps, and gives way to them if there are requests: other
        tenants' tokens do not wait. Returns the name of the file that is created in `folder` once
        it has been read.
        """
        request = compat.request_for(name, path, adapter_id)

        def work() -> StoredLoad:
            give_way = GiveWay(needed=beside_requests)  # in the thread whose time it counts
            return self._load(model, request, patches.load_adapter, give_way)

        return self._preloader.start(_key(request), work, folder)

    def forget(self, path: str, adapter_id: int) -> None:
        """Drop what was preloaded from a stored copy for an id."""
        self._preloader.forget((adapter_id, path))

    def take(self, model: WorkerModel, request: Any, original: Callable[..., Any]) -> StoredLoad:
        """The load that was preloaded, else one made now."""
        preloaded: StoredLoad | None = self._preloader.take(_key(request))
        return preloaded or self._load(model, request, original)

    def trial(self, model: WorkerModel, name: str, path: str, adapter_id: int) -> Reason | None:
        """Why this worker would not serve a stored copy; None if it would."""
        request = compat.request_for(name, path, adapter_id)
        result = self.take(model, request, patches.load_adapter).result
        return Reason.of(result) if isinstance(result, AdapterRejected) else None

    def stored_path(self, request: Any) -> Path | None:
        """The stored copy that a request means, if it is known."""
        return self._process.store.find(request.lora_path) or self._worker_admission.get(request)

    def _load(
        self,
        model: WorkerModel,
        request: Any,
        original: Callable[..., Any],
        give_way: Callable[[], None] = lambda: None,
    ) -> StoredLoad:
        started, stored, result = time.perf_counter(), None, None
        try:
            stored = open_stored_copy(self._path_to_load(model, request))
            result = enforce(model, request, original, stored, give_way)
        except AdapterRejected as refusal:
            result = refusal
        except Exception as error:
            logger.exception("s3lora: adapter %r", request.lora_name)
            result = GateFailed(f"{type(error).__name__}: {error}")
        return StoredLoad(stored, result, time.perf_counter() - started)

    def _path_to_load(self, model: WorkerModel, request: Any) -> Path:
        """The stored copy that the request names, else one that is admitted here."""
        path = self._process.store.find(request.lora_path)
        if path is None:
            path = None if request.load_inplace else self._worker_admission.get(request)
            path = path or self._worker_admission.admit(request, model)
        if self._process.store.is_quarantined(path):
            raise StoreDamaged(f"{path} could not be loaded, here or on another rank")
        return path


def _key(request: Any) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path
