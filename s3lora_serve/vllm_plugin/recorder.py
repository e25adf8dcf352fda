"""Tells log, metrics and audit log what the gate decided; none of them can change it."""

from s3lora_serve.audit import AuditLog
from s3lora_serve.errors import (
    AuditFailed,
    DeadlinePassed,
    GateFailed,
    Reason,
    StoreDamaged,
    StoreFull,
)
from s3lora_serve.metrics import Metrics
from s3lora_serve.policy import Audit, Policy
from s3lora_serve.settings import Settings
from s3lora_serve.spectral import resolve_device
from s3lora_serve.verdict import Decision, Verdict, rejected
from s3lora_serve.vllm_plugin import compat

logger = compat.logger

_FAILURES = {
    GateFailed.code: "score",
    DeadlinePassed.code: "deadline",
    StoreDamaged.code: "store",
    StoreFull.code: "store",
}


class Recorder:
    """What one process has to say; made where metrics can be registered, never at import."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self.metrics = Metrics()
        self._device = resolve_device(settings.device)
        self._audit = _audit_log(policy.audit)

    def require_audit(self, policy: Policy) -> None:
        """Let no adapter in that cannot be written down, where the policy asks for that.

        Raises:
            AuditFailed: the audit log is required and cannot be written.
        """
        if not (policy.audit.required and policy.mode == "enforce"):
            return
        if self._audit is None:
            raise AuditFailed("there is no audit log: audit.path and S3LORA_AUDIT_LOG are unset")
        try:
            self._audit.check()
        except OSError as problem:  # counted when the refusal is written down, or not
            raise AuditFailed(f"audit log {self._audit.path}: {problem.strerror}") from None

    def decided(self, verdict: Verdict, door: str) -> bool:
        """An adapter was decided on; whether that could be written down, where it is asked for."""
        say = logger.warning if verdict.decision is Decision.REJECTED else logger.info
        say("s3lora: adapter %r %s", verdict.name, _summary(verdict))
        self.metrics.record(verdict, self._device)
        self._count_failure(verdict.reason)
        return self._write(verdict, door)

    def reloaded(self, verdict: Verdict, source: str) -> None:
        """An adapter that the engine had let go came back: from the `store`, or from its `path`."""
        self.metrics.reloads.labels(source).inc()
        if source == "store":
            self._write(verdict, "reload")

    def policy_kept(self, problem: str, policy: Policy) -> None:
        """A changed policy file is not valid; the policy before it stays in force."""
        logger.error("s3lora: policy %s stays in force: %s", policy.digest, problem)
        self.metrics.failures.labels("policy").inc()

    def quarantined(self, verdict: Verdict, reason: Reason) -> None:
        """An adapter is served without effect because the engine could not do without it."""
        name = verdict.name
        logger.error("s3lora: adapter %r is quarantined, it answers as the base: %s", name, reason)
        self.metrics.quarantined.labels(reason.code).inc()
        self._count_failure(reason)
        self._write(rejected(verdict, reason), "quarantine")

    def _count_failure(self, reason: Reason | None) -> None:
        if reason and reason.code in _FAILURES:
            self.metrics.failures.labels(_FAILURES[reason.code]).inc()

    def _write(self, verdict: Verdict, door: str) -> bool:
        if self._audit is None:
            return True
        try:
            self._audit.record(verdict, door)
        except OSError as problem:
            logger.error("s3lora: audit log %s: %s", self._audit.path, problem)
            self.metrics.failures.labels("audit").inc()
            return False
        return True


def _audit_log(wanted: Audit) -> AuditLog | None:
    if wanted.path is None:
        return None
    version = compat.installed_version()
    return AuditLog(wanted.path, version, max_bytes=wanted.max_bytes, keep=wanted.keep)


def _summary(verdict: Verdict) -> str:
    if verdict.reason:
        return f"{verdict.decision.value}: {verdict.reason}"
    return (
        f"{verdict.decision.value}: {len(verdict.stripped)} of {len(verdict.modules)} modules sharp"
        f" {list(verdict.stripped)}, {verdict.seconds.total * 1000:.1f} ms"
    )
