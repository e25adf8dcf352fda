"""What an API server reports of registrations: recent decisions, rates, log, metrics, audit log."""

from functools import partial
from pathlib import Path
from typing import Any

from s3lora_serve.admission.verdict import Verdict, is_refused
from s3lora_serve.errors import (
    AdapterRejected,
    AuditFailed,
    LoadPostponed,
    RateExceeded,
    Reason,
)
from s3lora_serve.vllm_plugin.api.client import asked_by, note_retry
from s3lora_serve.vllm_plugin.api.rates import TenantRates
from s3lora_serve.vllm_plugin.api.recent_decisions import RecentDecisions
from s3lora_serve.vllm_plugin.api.registration import Registration
from s3lora_serve.vllm_plugin.api.work_threads import WorkThreads
from s3lora_serve.vllm_plugin.api.worker_calls import is_first_server
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess


class DecisionReports:
    """Reports decisions on the thread of the audit log."""

    def __init__(self, process: GuardedProcess, rates: TenantRates, audit: WorkThreads) -> None:
        self.recent = RecentDecisions()
        self._process = process
        self._rates = rates
        self._audit = audit

    async def decided(
        self, registration: Registration, engine: Any, verdict: Verdict, stored: Path | None = None
    ) -> bool:
        """Report a decision; whether it was written to the audit log."""
        registration.verdict = verdict
        self.recent.add(verdict)
        if is_refused(verdict):
            self._rates.count_refusal(registration.tenant, self._process.policy.rates)
        elif registration.door == "static" and not is_first_server(engine):
            return True  # every API server registers the static adapters, and one reports it
        report = partial(
            self._process.events.decided, stored=stored, asked_by=registration.requester
        )
        return await self._audit.run(report, verdict, registration.door)

    async def loaded(
        self, registration: Registration, engine: Any, verdict: Verdict, stored: Path
    ) -> None:
        """Report the decision on an adapter that the engine has loaded.

        Raises:
            Refused: a worker refuses it.
            AuditFailed: the policy requires the report, and it cannot be written.
        """
        written = await self.decided(registration, engine, verdict, stored)
        if is_refused(verdict):
            raise verdict.refusal
        if not written and self._process.policy.audit.required and verdict.mode == "enforce":
            raise AuditFailed("the decision could not be written down")

    def load_failed(
        self, registration: Registration, verdict: Verdict, stored: Path, failure: BaseException
    ) -> None:
        """Report a load that failed after admission; a refusal was reported as the decision."""
        if isinstance(failure, AdapterRejected):
            return
        report = partial(
            self._process.events.load_failed, stored=stored, asked_by=registration.requester
        )
        self._audit.start(partial(report, verdict, registration.door, failure))

    def postponed(self, postponed: LoadPostponed) -> None:
        """Count a load that is turned away for now, and have the answer say for how long."""
        note_retry(postponed.retry_seconds)
        reason = "rate" if isinstance(postponed, RateExceeded) else "queue"
        self._process.events.metrics.postponed_loads.labels(reason).inc()

    async def scanned(self, verdict: Verdict) -> None:
        """Report a dry scan."""
        await self._audit.run(self._process.events.scanned, verdict, asked_by())

    async def experiment_ended(self, verdict: Verdict, reason: Reason) -> None:
        """Report an experiment that the policy no longer allows."""
        await self._audit.run(self._process.events.experiment_ended, verdict, reason)

    def waiting(self, count: int) -> None:
        """Report how many loads wait for a place."""
        self._process.events.metrics.set_waiting_loads(count)
