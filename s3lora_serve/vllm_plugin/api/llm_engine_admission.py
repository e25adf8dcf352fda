"""Admission for `LLM.generate` and other users of vLLM's `LLMEngine`.

The verdict is made before the engine hashes the prompt, so prefix-cache blocks belong to the
admitted content.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.api.engine_load import FIRST_REPLACEMENT_ID
from s3lora_serve.vllm_plugin.bounded_map import remember
from s3lora_serve.vllm_plugin.model_modules import ModelModules


@dataclass(frozen=True, slots=True)
class _Admitted:
    adapter_id: int
    path: Path  # of the stored copy


class LLMEngineAdmission:
    """Admission in a process that holds an `LLMEngine`."""

    def __init__(self, controller: AdmissionController) -> None:
        self._controller = controller
        self._ids = count(FIRST_REPLACEMENT_ID)
        self._admitted: OrderedDict[tuple[str, int, str], _Admitted] = OrderedDict()
        self._modules: ModelModules | None = None

    def admitted_request(self, engine: Any, request: Any) -> Any:
        """The request with the stored copy's path; the worker quarantines a refused adapter.

        A folder is read on first use and when it is loaded in place, never in between.
        """
        if self._controller.store.find(request.lora_path) is not None:
            return request
        origin = (request.lora_name, request.lora_int_id, request.lora_path)
        admitted = self._admitted.get(origin)
        if admitted is None or request.load_inplace:
            try:
                path = self._admit(engine, request)
            except AdapterRejected:
                path = None
            if path is None:
                return request  # the worker decides and reports it
            admitted = self._replace(origin, admitted, path)
            own = request.lora_name, str(path), admitted.adapter_id, request.lora_path
            engine.collective_rpc("s3lora_registered", args=own)
        return compat.with_path(request, admitted.path, admitted.adapter_id)

    def _replace(
        self, origin: tuple[str, int, str], before: _Admitted | None, path: Path
    ) -> _Admitted:
        """Other content gets a new id: running requests finish with the adapter they began with."""
        if before is None:
            admitted = _Admitted(origin[1], path)
        elif before.path == path:
            admitted = before
        else:
            admitted = _Admitted(next(self._ids), path)
        dropped = remember(self._admitted, origin, admitted)
        for old in (before, dropped):
            if old is not None:
                self._controller.store.unpin(old.path)
        return admitted

    def _admit(self, engine: Any, request: Any) -> Path | None:
        check_lengths(request.lora_name, request.lora_path)
        folder = compat.adapter_folder(request, download=not self._controller.policy.limits.roots)
        if folder is None:
            return None
        verdict, path = self._controller.admit(
            folder,
            request.lora_name,
            compat.base_model(engine.vllm_config),
            self._model_modules(engine),
            store_refused=True,
        )
        self._controller.events.decided(verdict, "engine", stored=path)
        return path

    def _model_modules(self, engine: Any) -> ModelModules:
        if self._modules is None:
            self._modules = self._controller.learn_model(engine.collective_rpc("s3lora_model"))
        return self._modules
