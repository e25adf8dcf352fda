"""Events of one process, written to log, metrics and audit log.

No event changes a decision, except that `audit.required` refuses what cannot be written. Every
method may be called from any thread; those that write the audit log may wait for its lock.
"""

from asyncio import CancelledError
from dataclasses import replace
from logging import Logger
from pathlib import Path

from s3lora_serve.admission.verdict import Decision, Verdict, is_refused, with_rejection
from s3lora_serve.errors import (
    AuditFailed,
    DeadlinePassed,
    GateFailed,
    Reason,
    StoreDamaged,
    StoreFull,
)
from s3lora_serve.policy.schema import Policy
from s3lora_serve.spectral import resolve_device, take_fallbacks
from s3lora_serve.telemetry.audit_event import AuditEvent, Copy, Event, Requester
from s3lora_serve.telemetry.audit_log import AuditLog
from s3lora_serve.telemetry.audit_writer import AuditWriter
from s3lora_serve.telemetry.metrics import Metrics

EXPERIMENT = "experiment"
"""The door of registrations with settings of their own. They count in a metric of their own."""

SHOWN = 8
"""Parts of an adapter that the model does not take, in a line of the log. The verdict has all."""

_FAILURES = {
    GateFailed.code: "score",
    DeadlinePassed.code: "deadline",
    StoreDamaged.code: "store",
    StoreFull.code: "store",
}


class AdmissionEvents:
    """What one process reports. Created where metrics can be registered, never at import."""

    def __init__(self, policy: Policy, device: str, logger: Logger, vllm_version: str) -> None:
        self.metrics = Metrics()
        self._device = resolve_device(device)
        self._logger = logger
        audit = policy.audit
        self._audit: AuditLog | None = None
        self._writer: AuditWriter | None = None
        if audit.path is not None:
            self._audit = AuditLog(
                audit.path, vllm_version, max_bytes=audit.max_bytes, keep=audit.keep
            )
            self._writer = AuditWriter(self._audit, self._not_written)

    def require_audit(self, policy: Policy) -> None:
        """Check that the audit log can be written, if the policy requires one.

        Raises:
            AuditFailed: the audit log is required and cannot be written.
        """
        if not (policy.audit.required and policy.mode == "enforce"):
            return
        if self._audit is None:
            raise AuditFailed("there is no audit log: audit.path and S3LORA_AUDIT_LOG are unset")
        try:
            self._audit.check()
        except OSError as problem:  # counted when the refusal itself cannot be written
            raise AuditFailed(f"audit log {self._audit.path}: {problem.strerror}") from None

    def decided(
        self,
        verdict: Verdict,
        door: str,
        *,
        stored: Path | None = None,
        asked_by: Requester | None = None,
    ) -> bool:
        """Report a decision; return False if it could not be written to the audit log.

        Args:
            verdict: the decision.
            door: where the adapter arrived.
            stored: the stored copy, which is served unless the verdict refuses it.
            asked_by: who registers the adapter, as far as known.
        """
        report = (
            self._logger.warning if verdict.decision is Decision.REJECTED else self._logger.info
        )
        report("s3lora: adapter %r %s", verdict.name, _summary(verdict))
        for cause, count in take_fallbacks().items():
            self.metrics.device_fallbacks.labels(cause).inc(count)
        if door == EXPERIMENT:
            self.metrics.experiments.labels(verdict.decision.value).inc()
        else:
            self.metrics.record(verdict, self._device)
        self._count_failure(verdict.reason)
        copy = stored.name if stored and not is_refused(verdict) else None
        return self._write(
            AuditEvent(Event.DECISION, verdict, door=door, stored_copy=copy, asked_by=asked_by)
        )

    def scanned(self, verdict: Verdict, asked_by: Requester | None) -> None:
        """Report a decision on an adapter that is not registered."""
        self._write(AuditEvent(Event.SCAN, verdict, asked_by=asked_by))

    def load_failed(
        self,
        verdict: Verdict,
        door: str,
        failure: BaseException,
        *,
        stored: Path,
        asked_by: Requester | None,
    ) -> None:
        """Report an admitted adapter that the engine did not load, or whose client left."""
        said = f"{type(failure).__name__}: {failure}".removesuffix(": ")
        why = "cancelled" if isinstance(failure, CancelledError) else said
        self._logger.warning("s3lora: adapter %r was not loaded: %s", verdict.name, why)
        self._write(
            AuditEvent(
                Event.LOAD_FAILED,
                verdict,
                door=door,
                stored_copy=stored.name,
                asked_by=asked_by,
                failure=why,
            )
        )

    def replaced(
        self, verdict: Verdict, stored: Path, by: Copy, *, asked_by: Requester | None
    ) -> None:
        """Report the end of an adapter whose name another one takes."""
        self._write(
            AuditEvent(
                Event.REPLACEMENT,
                verdict,
                stored_copy=stored.name,
                asked_by=asked_by,
                replaced_by=by,
            )
        )

    def unloaded(self, verdict: Verdict, stored: Path, *, asked_by: Requester | None) -> None:
        """Report an adapter that is not served any more."""
        self._write(AuditEvent(Event.UNLOAD, verdict, stored_copy=stored.name, asked_by=asked_by))

    def reloaded(self, verdict: Verdict, source: str) -> None:
        """Report an evicted adapter that was loaded again, from the `store` or from its `path`."""
        self.metrics.reloads.labels(source).inc()
        if source == "store":
            self._write(AuditEvent(Event.RELOAD, verdict))

    def experiment_ended(self, verdict: Verdict, reason: Reason) -> None:
        """Report an experiment that the gate ends because the policy no longer allows it."""
        self._logger.warning("s3lora: experiment %r is unloaded: %s", verdict.name, reason)
        self._write(AuditEvent(Event.EXPERIMENT_ENDED, replace(verdict, reason=reason)))

    def policy_kept(self, problem: str, policy: Policy) -> None:
        """Report a changed policy file that is invalid; `policy` stays in force."""
        self._logger.error("s3lora: policy %s stays in force: %s", policy.digest, problem)
        self.metrics.failures.labels("policy").inc()

    def quarantined(self, verdict: Verdict, reason: Reason) -> None:
        """Report an adapter that is served without effect."""
        self._logger.error(
            "s3lora: adapter %r is quarantined, it answers as the base: %s", verdict.name, reason
        )
        self.metrics.quarantined.labels(reason.code).inc()
        self._count_failure(reason)
        self._write(AuditEvent(Event.QUARANTINE, with_rejection(verdict, reason)))

    def _count_failure(self, reason: Reason | None) -> None:
        if reason and reason.code in _FAILURES:
            self.metrics.failures.labels(_FAILURES[reason.code]).inc()

    def _write(self, event: AuditEvent) -> bool:
        return self._writer is None or self._writer.write(event)

    def _not_written(self, problem: OSError) -> None:
        self._logger.error("s3lora: audit log %s: %s", self._audit and self._audit.path, problem)
        self.metrics.failures.labels("audit").inc()


def _summary(verdict: Verdict) -> str:
    if verdict.reason:
        return f"{verdict.decision.value}: {verdict.reason}"
    stripped, count = list(verdict.stripped), len(verdict.modules)
    if verdict.selected_by == "plan":
        said = (
            f"plan {verdict.plan_digest} strips {len(stripped)} of {count} modules {stripped} and"
            f" transforms {len(verdict.transformed)} {list(verdict.transformed)}"
        )
    elif verdict.repair is not None:
        said = (
            f"repairs {len(verdict.repaired)} of {count} modules, which leaves"
            f" {verdict.repair.residual:.3g} of their effect on refusals and"
            f" {verdict.repair.kept:.3g} on benign ones"
        )
        said += "" if verdict.suspicion is None else f"; suspicion {verdict.suspicion:.3g}"
        said += f"; strips {len(stripped)} {stripped}" if stripped else ""
    elif verdict.projected:
        said = f"projects {len(verdict.projected)} of {count} modules {list(verdict.projected)}"
    else:
        found = "least aligned" if verdict.by_alignment else "sharp"
        said = f"{len(stripped)} of {count} modules {found} {stripped}"
    if verdict.left_out:
        some = f"{list(verdict.left_out[:SHOWN])}{' …' * (len(verdict.left_out) > SHOWN)}"
        said += f"; the model does not take {len(verdict.left_out)} of its parts {some}"
    return f"{verdict.decision.value}: {said}, {verdict.seconds.total * 1000:.1f} ms"
