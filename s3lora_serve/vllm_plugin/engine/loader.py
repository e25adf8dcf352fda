"""The choke point in a worker: it loads admitted stored copies, or adapters without effect.

Nothing here raises. An exception would stop the engine for every tenant, or leave the ranks of a
tensor-parallel engine out of step.
"""

from collections.abc import Callable
from typing import Any

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import Reason, RefusedByVLLM
from s3lora_serve.store.stored_copy import StoredCopy
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.engine.load_outcomes import LoadOutcomes
from s3lora_serve.vllm_plugin.engine.loaded_adapter import adapter_without_effect, add_to_slot
from s3lora_serve.vllm_plugin.engine.quarantine import Quarantine
from s3lora_serve.vllm_plugin.engine.stored_loads import StoredLoads
from s3lora_serve.vllm_plugin.engine.worker_models import WorkerModels
from s3lora_serve.vllm_plugin.engine.worker_registrations import WorkerRegistrations
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess

logger = compat.logger


class AdapterLoader:
    """Loads adapters in one worker process."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self.models = WorkerModels(process)
        self.registrations = WorkerRegistrations()
        self.outcomes = LoadOutcomes()
        self.stored_loads = StoredLoads(process)
        self.quarantine = Quarantine(process)

    def load(self, manager: Any, request: Any, original: Callable[..., Any]) -> Any:
        """Load an adapter; replaces vLLM's `_load_adapter`. A refused one has no effect."""
        load = self.stored_loads.take(self.models.of(manager), request, original)
        verdict = load.stored.verdict if load.stored else None
        if load.stored is None or isinstance(load.result, Exception):
            return self._without_effect(request, Reason.of(load.result), verdict)
        if compat.is_first_rank():
            self._report(request, load.stored, load.seconds)
        key = load.stored.path.name
        self.outcomes.loaded(request.lora_int_id, key, manager.list_adapters)
        return load.result

    def add(self, manager: Any, request: Any, original: Callable[..., bool]) -> bool:
        """Add an adapter to the engine, never half; replaces `add_adapter`.

        vLLM marks an adapter active before it fills its slot. After an error in between, later
        modules would keep the weights of the slot's previous adapter.
        """
        loaded = self.outcomes.key(request.lora_int_id)
        path = self.stored_loads.stored_path(request)
        if loaded and path and (loaded != path.name or self.quarantine.has(path)):
            # The id was another adapter's, or another rank could not load it: no rank serves it.
            manager.remove_adapter(request.lora_int_id)
        try:
            return original(manager, request)
        except Exception as error:
            logger.exception("s3lora: adapter %r", request.lora_name)
            manager.remove_adapter(request.lora_int_id)
            failed = RefusedByVLLM(f"vLLM says: {type(error).__name__}: {error}")
            return add_to_slot(manager, self._without_effect(request, Reason.of(failed), None))
        finally:
            # vLLM keeps the request for later steps, which must not read the adapter again.
            request.load_inplace = False

    def _report(self, request: Any, stored: StoredCopy, seconds: float) -> None:
        """Report a load: of a registration how long it took, else that it was a re-load."""
        events = self._process.events
        if self.registrations.is_under_way(request):
            events.metrics.observe_strip(seconds)
        elif self.outcomes.key(request.lora_int_id) == stored.path.name:
            own = request.lora_name, self.registrations.path(request)
            events.reloaded(stored.verdict_for(*own), "store")

    def _without_effect(self, request: Any, reason: Reason, verdict: Verdict | None) -> Any:
        """An adapter without effect that replaces a refused one; quarantined unless registering."""
        self.outcomes.refused(request.lora_int_id, reason)
        mode = verdict.mode if verdict else self._process.policy.mode
        # A registration asks for the refusal, answers its client and removes the adapter.
        if not (mode == "enforce" and self.registrations.is_under_way(request)):
            stored, path = self.stored_loads.stored_path(request), self.registrations.path(request)
            self.quarantine.put(request, stored, reason, verdict, path)
        return adapter_without_effect(request)
