"""Admission for `LLM.generate` and other users of vLLM's `LLMEngine`.

The verdict is made before the engine hashes the prompt, so prefix-cache blocks belong to the
admitted content.
"""

from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.model_modules import ModelModules
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopies


class LLMEngineAdmission:
    """Admission in a process that holds an `LLMEngine`."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self._controller = AdmissionController(process)
        self._copies = PinnedCopies(process.store)
        self._modules: ModelModules | None = None

    def admitted_request(self, engine: Any, request: Any) -> Any:
        """The request with the stored copy's path; the worker quarantines a refused adapter.

        A folder is read on first use and when it is loaded in place, never in between.
        """
        if self._process.store.find(request.lora_path) is not None:
            return request
        admitted = self._copies.get(request)
        if admitted is None or request.load_inplace:
            try:
                path = self._admit(engine, request)
            except AdapterRejected:
                path = None
            if path is None:
                return request  # the worker decides and reports it
            admitted = self._copies.put(request, path)
            own = request.lora_name, str(path), admitted.adapter_id, request.lora_path
            engine.collective_rpc("s3lora_registered", args=own)
        return compat.with_path(request, admitted.path, admitted.adapter_id)

    def _admit(self, engine: Any, request: Any) -> Path | None:
        check_lengths(request.lora_name, request.lora_path)
        folder = compat.adapter_folder(request, download=not self._process.policy.limits.roots)
        if folder is None:
            return None
        verdict, path = self._controller.admit(
            folder,
            request.lora_name,
            compat.base_model(engine.vllm_config),
            self._model_modules(engine),
            store_refused=True,
        )
        self._process.events.decided(verdict, "engine", stored=path)
        return path

    def _model_modules(self, engine: Any) -> ModelModules:
        if self._modules is None:
            self._modules = self._controller.learn_model(engine.collective_rpc("s3lora_model"))
        return self._modules
