"""Methods that the API server may call on each worker, by `collective_rpc("s3lora_…")`."""

from pathlib import Path
from typing import Any

from s3lora_serve.errors import Reason
from s3lora_serve.vllm_plugin import patches
from s3lora_serve.vllm_plugin.engine.loader import AdapterLoader
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess


class WorkerMethods:
    """Answers of one worker, as plain data."""

    def __init__(self, process: GuardedProcess, loader: AdapterLoader) -> None:
        self._process = process
        self._models = loader.models
        self._loads = loader.stored_loads
        self._outcomes = loader.outcomes
        self._registrations = loader.registrations

    def install(self) -> None:
        """Add the methods to vLLM's worker class.

        Raises:
            ContractBroken: a name is taken.
        """
        names = ("status", "model", "preload", "loaded", "forget", "refresh", "trial", "registered")
        for name in names:
            patches.add_worker_method(f"s3lora_{name}", getattr(self, name))

    def status(self) -> dict[str, Any]:
        """Whether this worker is guarded, and the digest of its policy."""
        policy, model = self._process.policy, self._models.latest
        active = model.manager is not None and policy.mode != "off"
        return {"active": active, "policy_digest": policy.digest}

    def model(self) -> dict[str, Any]:
        """(layer, projection) and names and shapes of the modules in this worker's part."""
        model = self._models.latest
        return {"places": sorted(model.places), **model.modules.as_plain()}

    def preload(
        self,
        name: str,
        path: str,
        adapter_id: int,
        origin: str | None,
        folder: str,
        beside_requests: bool,
    ) -> str:
        """Start reading a stored copy; the name of the file in `folder` that reports the end.

        `origin` is the path that it is being registered with, until `loaded` asks what came of it;
        None: the copy is not to be registered.
        """
        stored = (name, path, adapter_id)
        if origin is not None:
            self._registrations.add(adapter_id, name, path, origin, is_under_way=True)
        return self._loads.preload(
            self._models.latest, *stored, folder=Path(folder), beside_requests=beside_requests
        )

    def forget(self, path: str, adapter_id: int) -> None:
        """Drop what was preloaded: nobody will add it."""
        self._loads.forget(path, adapter_id)

    def loaded(self, path: str, adapter_id: int) -> tuple[str | None, tuple[str, str] | None]:
        """The store key of the copy loaded under an id, and why it is without effect, if it is.

        What was preloaded for it is dropped if the engine had it already.
        """
        self._loads.forget(path, adapter_id)
        self._registrations.end(adapter_id)
        return self._outcomes.key(adapter_id), _plain(self._outcomes.refusal(adapter_id))

    def refresh(self) -> None:
        """Reload a policy file that has changed."""
        self._process.reload_policy()
        self._models.report_policy()

    def registered(self, name: str, path: str, adapter_id: int, origin: str) -> None:
        """Keep the path that an adapter was registered with, which log and audit log show."""
        self._registrations.add(adapter_id, name, path, origin, is_under_way=False)

    def trial(self, name: str, path: str, adapter_id: int) -> tuple[str, str] | None:
        """Code and message of why this worker would not serve a stored copy; None if it would."""
        return _plain(self._loads.trial(self._models.latest, name, path, adapter_id))


def _plain(reason: Reason | None) -> tuple[str, str] | None:
    return (reason.code, reason.message) if reason else None
