"""The choke point: every adapter a worker loads is copied, scored, ruled on and stripped here."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from s3lora_serve.admission import Admission, admit
from s3lora_serve.audit import AuditLog
from s3lora_serve.errors import (
    AdapterRejected,
    DeadlinePassed,
    GateFailed,
    Reason,
)
from s3lora_serve.intake import PrivateFolder
from s3lora_serve.metrics import OTHER, Metrics
from s3lora_serve.policy import Policy
from s3lora_serve.policy_file import serving_policy
from s3lora_serve.settings import Settings, load_settings
from s3lora_serve.spectral import resolve_device
from s3lora_serve.verdict import Decision, Verdict
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.fit import check_loaded, fitted_names, load_copy

logger = logging.getLogger("vllm.s3lora")  # vLLM's handlers print what is below "vllm"

MOST_REMEMBERED = 1000
"""Verdicts a worker keeps for the API server to ask about; tenants choose the names."""

_guard: "Guard | None" = None


def install() -> None:
    """Guard this process, once.

    Raises:
        S3LoRAError: the policy, the environment or vLLM's contract is not as it must be.
    """
    global _guard
    if _guard is not None:
        return
    settings = load_settings()
    policy = serving_policy(settings)
    compat.check_contract()
    guard = Guard(policy, settings)
    compat.after_create_lora_manager(guard.activate)
    compat.add_worker_method("s3lora_status", lambda _worker: guard.status())
    compat.add_worker_method("s3lora_decision", lambda _worker, name: guard.decision(name))
    if policy.mode != "off":
        compat.wrap_load_adapter(guard.load)
    _guard = guard


class Guard:
    """The gate of one worker process."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self.policy = policy
        self.settings = settings
        self.metrics: Metrics | None = None
        self.audit = (
            AuditLog(policy.audit.path, compat.installed_version()) if policy.audit.path else None
        )
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()

    def activate(self, manager: Any) -> None:
        """A worker has its LoRA modules: learn their names and say that the gate is up."""
        self.metrics = self.metrics or Metrics()
        shapes = compat.module_shapes(manager)
        self.metrics.know_model(_places(shapes))
        release, digest, mode = version("s3lora-serve"), self.policy.digest, self.policy.mode
        self.metrics.activate(digest, mode, release)
        logger.info("s3lora %s: gate in mode %s, policy %s", release, mode, digest)

    def status(self) -> dict[str, Any]:
        """What this worker says when asked whether it is guarded."""
        return {"active": self.metrics is not None and self.policy.mode != "off"}

    def decision(self, name: str) -> dict[str, str | None] | None:
        """The last decision on the adapter of this name, and the refusal's text."""
        found = self._verdicts.get(name)
        if found is None:
            return None
        refusal = str(found.reason) if found.reason else None
        return {"decision": found.decision.value, "refusal": refusal}

    def load(self, manager: Any, request: Any, original: Callable[..., Any]) -> Any:
        """Load an adapter through the gate, in the place of vLLM's `_load_adapter`.

        Raises:
            AdapterRejected: it is not admitted; nothing of it reaches the engine.
        """
        folder = compat.adapter_folder(request)
        if folder is None:
            raise compat.not_found(request)
        with PrivateFolder(self.settings.state_dir) as private:
            admission = admit(
                folder,
                request.lora_name,
                self.policy,
                base_model=_base_model(manager),
                device=self.settings.device,
                into=private.make,
            )
            copied = compat.with_path(request, private.path)
            lora, verdict = self._enforce(manager, copied, original, admission)
        self._record(verdict)
        if lora is None and verdict.reason:
            raise _Refused(verdict.reason)
        return lora

    def _enforce(
        self,
        manager: Any,
        request: Any,
        original: Callable[..., Any],
        admission: Admission,
    ) -> tuple[Any | None, Verdict]:
        """The LoRAModel that vLLM may take, or None with a rejected verdict."""
        verdict, refusal = admission.verdict, admission.refusal
        adapter = admission.adapter
        if adapter is None or admission.unscored or (refusal and verdict.mode == "enforce"):
            return None, verdict
        started = time.perf_counter()
        try:
            served = fitted_names(manager, adapter)
            lora = load_copy(manager, request, original)
            check_loaded(lora, served, adapter)
            if verdict.mode == "enforce":
                for name in verdict.stripped:
                    lora.loras.pop(served[name], None)
            if not lora.loras:
                compat.make_inert(lora)
        except AdapterRejected as error:
            return None, _rejected(verdict, error)
        if self.metrics:
            self.metrics.observe_strip(time.perf_counter() - started)
        return lora, verdict

    def _record(self, verdict: Verdict) -> None:
        """Tell the log, the metrics and the audit log; none of them can change the decision."""
        self._verdicts[verdict.name] = verdict
        if len(self._verdicts) > MOST_REMEMBERED:
            self._verdicts.popitem(last=False)
        if not compat.is_first_rank():
            return
        say = logger.warning if verdict.decision is Decision.REJECTED else logger.info
        say("s3lora: adapter %r %s", verdict.name, _summary(verdict))
        if self.metrics:
            self.metrics.record(verdict, resolve_device(self.settings.device))
            for error, reason in ((GateFailed, "score"), (DeadlinePassed, "deadline")):
                if verdict.reason and verdict.reason.code == error.code:
                    self.metrics.failures.labels(reason).inc()
        if self.audit:
            try:
                self.audit.record(verdict, "engine")
            except OSError as problem:
                logger.error("s3lora: audit log %s: %s", self.audit.path, problem)
                if self.metrics:
                    self.metrics.failures.labels("audit").inc()


class _Refused(AdapterRejected):
    """A rejected verdict on its way through vLLM, which keeps only the text."""

    def __init__(self, reason: Reason) -> None:
        Exception.__init__(self, str(reason))


def _rejected(verdict: Verdict, refusal: AdapterRejected) -> Verdict:
    """The verdict once the model or vLLM has refused what the gate would have let pass."""
    kept = tuple(replace(module, stripped=False) for module in verdict.modules)
    reason = Reason.of(refusal)
    return replace(verdict, decision=Decision.REJECTED, reason=reason, modules=kept)


def _base_model(manager: Any) -> str | None:
    return getattr(getattr(manager._adapter_manager.model, "config", None), "_name_or_path", None)


def _places(names: Iterable[str]) -> set[tuple[str, str]]:
    """(layer, projection) of the base model's modules."""
    places = set()
    for name in names:
        parts = name.split(".")
        layer = next((part for part in parts if part.isdecimal()), OTHER)
        places.add((layer, parts[-1]))
    return places


def _summary(verdict: Verdict) -> str:
    if verdict.reason:
        return f"{verdict.decision.value}: {verdict.reason}"
    return (
        f"{verdict.decision.value}: {len(verdict.stripped)} of {len(verdict.modules)} modules sharp"
        f" {list(verdict.stripped)}, {verdict.seconds.total * 1000:.1f} ms"
    )
