"""Puts the gate in the place of what it guards, in whichever of vLLM's processes this is."""

from typing import Any

from s3lora_serve.errors import Reason
from s3lora_serve.guarding import vllm_release
from s3lora_serve.settings import load_settings
from s3lora_serve.vllm_plugin import compat, contract, patches
from s3lora_serve.vllm_plugin.base_tokens import spare_base_tokens
from s3lora_serve.vllm_plugin.desk import Desk
from s3lora_serve.vllm_plugin.guard import Guard
from s3lora_serve.vllm_plugin.offline import OfflineDoor
from s3lora_serve.vllm_plugin.pattern_matching import match_patterns
from s3lora_serve.vllm_plugin.registrar import Registrar, door
from s3lora_serve.vllm_plugin.skipping import Skipping

_registrar: Registrar | None = None
_installed = False


def install() -> None:
    """Guard this process, once.

    Raises:
        S3LoRAError: the policy, the environment or vLLM's contract is not as it must be.
    """
    global _registrar, _installed
    if _installed:
        return
    settings = load_settings()
    desk = Desk(settings)
    contract.check_contract()
    release = vllm_release()
    if not release.passed:
        compat.logger.warning("s3lora: %s; it has what the gate relies on", release.detail)
    guard = Guard(desk)
    patches.after_create_lora_manager(guard.activate)
    answers = WorkerAnswers(guard)
    for name in ("status", "model", "prepared", "loaded", "refresh", "trial"):
        patches.add_worker_method(f"s3lora_{name}", getattr(answers, name))
    if desk.policy.mode != "off":
        desk.store.prepare()
        _registrar = Registrar(desk)
        patches.tell_requests_apart()
        spare_base_tokens()
        match_patterns()
        patches.after_create_lora_manager(Skipping(wanted=settings.skip_stripped).activate)
        patches.wrap_load_adapter(guard.load)
        patches.wrap_add_adapter(guard.add)
        patches.around_registration(guard.registration)
        patches.wrap_add_lora(_registrar.add_lora)
        patches.wrap_add_request(OfflineDoor(desk).admitted)
        patches.wrap_doors(door)
        patches.wrap_model_list(_registrar.served.origin)
        patches.wrap_unload(_registrar.served.remove)
        patches.mark_blocks(guard.is_quarantined)
    _installed = True


def registrar() -> Registrar | None:
    """The registrar of this process, if the gate is installed and not off."""
    return _registrar


class WorkerAnswers:
    """What the API server may ask of each worker, by `collective_rpc("s3lora_…")`."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def status(self) -> dict[str, Any]:
        """Whether this worker is guarded, and by which policy."""
        policy, model = self._guard.desk.policy, self._guard.model
        active = model.manager is not None and policy.mode != "off"
        return {"active": active, "policy_digest": policy.digest}

    def model(self) -> dict[str, list[tuple[Any, Any]]]:
        """(layer, projection) and (m, n) of the modules of this worker's part of the model."""
        model = self._guard.model
        return {"places": sorted(model.places), "shapes": sorted(model.shapes)}

    def prepared(self, name: str, path: str, adapter_id: int) -> bool:
        """Whether this worker has read what is kept at a path; it begins when first asked."""
        return self._guard.is_prepared(name, path, adapter_id)

    def loaded(self, adapter_id: int) -> tuple[str | None, tuple[str, str] | None]:
        """The store's name for what this worker loaded under an id, or why it has no effect."""
        return self._guard.holds(adapter_id), _plain(self._guard.refusal(adapter_id))

    def refresh(self) -> None:
        """Take up a policy file that has changed."""
        self._guard.desk.refresh()
        self._guard.show_policy()

    def trial(self, name: str, path: str, adapter_id: int) -> tuple[str, str] | None:
        """Code and message of why this worker would not serve what is kept at a path, if so."""
        return _plain(self._guard.trial(name, path, adapter_id))


def _plain(reason: Reason | None) -> tuple[str, str] | None:
    return (reason.code, reason.message) if reason else None
