"""The choke point in a worker: it loads admitted stored copies, or adapters without effect.

Nothing here raises, but `activate` at start. An exception would stop the engine for every tenant,
or leave the ranks of a tensor-parallel engine out of step.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import Reason, RefusedByVLLM
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.bounded_map import remember
from s3lora_serve.vllm_plugin.engine.loaded_adapter import adapter_without_effect, add_to_slot
from s3lora_serve.vllm_plugin.engine.loaded_keys import LoadedKeys
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel
from s3lora_serve.vllm_plugin.engine.operator_files_fit import check_operator_files_fit
from s3lora_serve.vllm_plugin.engine.quarantine import quarantine
from s3lora_serve.vllm_plugin.engine.registered_paths import RegisteredPaths
from s3lora_serve.vllm_plugin.engine.stored_loads import StoredLoads

logger = compat.logger


class AdapterLoader:
    """Loads adapters in one worker process."""

    def __init__(self, controller: AdmissionController) -> None:
        self.controller = controller
        self.model = WorkerModel()  # the latest
        self.registered_paths = RegisteredPaths()
        self._models: WeakKeyDictionary[Any, WorkerModel] = WeakKeyDictionary()  # by its manager
        self.stored_loads = StoredLoads(controller)
        self._registering = False
        self._refusals: OrderedDict[int, Reason] = OrderedDict()  # by adapter id
        self._loaded = LoadedKeys()

    def activate(self, manager: Any, vllm_config: Any) -> None:
        """Read the worker's LoRA modules, and report that its gate is active.

        Raises:
            PolicyInvalid: a file that the policy names was made for another model.
        """
        model = WorkerModel.of(manager, vllm_config)
        if self.controller.policy.mode != "off":
            check_operator_files_fit(model, self.controller.policy)
        self.model = self._models[manager] = model
        self.controller.events.metrics.set_model_modules(self.model.places)
        self.controller.events.metrics.set_preloads(0)
        self.report_policy()

    def report_policy(self) -> None:
        """Report the policy in force, in metrics and log."""
        policy, release = self.controller.policy, version("s3lora-serve")
        self.controller.events.metrics.activate(policy.digest, policy.mode, release)
        logger.info("s3lora %s: gate in mode %s, policy %s", release, policy.mode, policy.digest)

    @contextmanager
    def registration(self) -> Iterator[None]:
        """Within this context the caller asks for the refusal of a load and handles it."""
        self._registering = True
        try:
            yield
        finally:
            self._registering = False

    def load(self, manager: Any, request: Any, original: Callable[..., Any]) -> Any:
        """Load an adapter; replaces vLLM's `_load_adapter`. A refused one has no effect."""
        adapter_id = request.lora_int_id
        model = self._models.get(manager, self.model)
        load = self.stored_loads.take(model, request, original)
        verdict = load.stored.verdict if load.stored else None
        if load.stored is None or isinstance(load.result, Exception):
            return self._without_effect(request, Reason.of(load.result), verdict)
        stored = load.stored
        if compat.is_first_rank():
            events = self.controller.events
            if self._registering:
                events.metrics.observe_strip(load.seconds)
            elif self._loaded.get(adapter_id) == stored.path.name:
                own = request.lora_name, self.registered_paths.of(request)
                events.reloaded(stored.verdict_for(*own), "store")
        self._refusals.pop(adapter_id, None)
        self._loaded.note(adapter_id, stored.path.name, manager.list_adapters)
        return load.result

    def add(self, manager: Any, request: Any, original: Callable[..., bool]) -> bool:
        """Add an adapter to the engine, never half; replaces `add_adapter`.

        vLLM marks an adapter active before it fills its slot. After an error in between, later
        modules would keep the weights of the slot's previous adapter.
        """
        loaded = self._loaded.get(request.lora_int_id)
        path = self.stored_loads.stored_path(request)
        if loaded and path and (loaded != path.name or self.controller.store.is_quarantined(path)):
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

    def is_quarantined(self, path: str) -> bool:
        """Whether the stored copy at this path is quarantined, on any rank."""
        stored = self.controller.store.find(path)
        return stored is not None and self.controller.store.is_quarantined(stored)

    def refusal(self, adapter_id: int) -> Reason | None:
        """Why this worker loaded an adapter without effect; None if it did not."""
        return self._refusals.get(adapter_id)

    def loaded_key(self, adapter_id: int) -> str | None:
        """The store key of the copy that this worker loaded under an id."""
        return self._loaded.get(adapter_id)

    def _without_effect(self, request: Any, reason: Reason, verdict: Verdict | None) -> Any:
        """An adapter without effect that replaces a refused one; quarantined unless registering."""
        remember(self._refusals, request.lora_int_id, reason)
        self._loaded.forget(request.lora_int_id)
        mode = verdict.mode if verdict else self.controller.policy.mode
        # A registration asks for the refusal, answers its client and removes the adapter.
        registered = self._registering and self.controller.store.find(request.lora_path) is not None
        if not (registered and mode == "enforce"):
            stored, path = self.stored_loads.stored_path(request), self.registered_paths.of(request)
            quarantine(self.controller, request, stored, reason, verdict, path)
        return adapter_without_effect(request)
