"""Admission, in a worker, of adapters that no API server registered (`LLM.generate`)."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from s3lora_serve.errors import NotAnAdapter
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopies


class WorkerAdmission:
    """Admits adapters in a worker, and keeps their stored copies by what the request says."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self._controller = AdmissionController(process)
        self._copies = PinnedCopies(process.store)

    def get(self, request: Any) -> Path | None:
        """The stored copy of an adapter that was admitted before."""
        copy = self._copies.get(request)
        return copy.path if copy else None

    def admit(self, request: Any, model: WorkerModel) -> Path:
        """Admit an adapter, or admit it anew; the stored copy's path, pinned.

        Raises:
            AdapterRejected: it cannot be stored.
        """
        return self._copies.put(request, self._admit(request, model)).path

    def _admit(self, request: Any, model: WorkerModel) -> Path:
        check_lengths(request.lora_name, request.lora_path)
        folder = compat.adapter_folder(request, download=not self._process.policy.limits.roots)
        if folder is None:
            raise NotAnAdapter(f"{request.lora_path} does not exist")
        verdict, path = self._controller.admit(
            folder, request.lora_name, model.base_model, model.modules, store_refused=True
        )
        if path is None:
            raise verdict.refusal
        # A bad plan may be mended or removed, which is not in what the ranks agree on.
        if verdict.digest and not (verdict.reason and verdict.reason.passes):
            # Each rank scores for itself. If they differ, the first verdict holds for all ranks.
            content = (verdict.digest, verdict.config_file_digest, verdict.policy_digest)
            obeyed = (*content, verdict.plan_digest)
            modules = model.modules.shapes if model.modules.is_whole else {}
            served = (model.base_model, sorted(modules.items()))
            named = (version("s3lora-serve"), request.lora_name, str(folder))
            path = self._process.store.agree_on(repr((*named, *served, *obeyed)), path)
        if compat.is_first_rank():
            self._process.events.decided(verdict, "engine", stored=path)
        return path
