"""Registration in the API server: the verdict is made here, before any worker hears of the adapter.

It is made off the engine's loop, so that other tenants' tokens do not wait.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from s3lora_serve.admission.repairing import preload_statistics
from s3lora_serve.admission.verdict import Verdict, is_refused, with_rejection
from s3lora_serve.errors import (
    AdapterRejected,
    AuditFailed,
    LoadPostponed,
    RateExceeded,
)
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.owners import foreign_unload
from s3lora_serve.spectral import resolve_device, warm_up
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.api.admissions import Admissions
from s3lora_serve.vllm_plugin.api.attempt import Attempt, door, experiment
from s3lora_serve.vllm_plugin.api.engine_load import EngineLoad
from s3lora_serve.vllm_plugin.api.inspections import Inspections
from s3lora_serve.vllm_plugin.api.rates import tenant_of
from s3lora_serve.vllm_plugin.api.recent_decisions import RecentDecisions
from s3lora_serve.vllm_plugin.api.requester import asked_with, note_retry, requester
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters
from s3lora_serve.vllm_plugin.api.tasks import Tasks
from s3lora_serve.vllm_plugin.api.work_threads import (
    WorkThreads,
    load_places,
    start_in_background,
    stop_at_exit,
)
from s3lora_serve.vllm_plugin.api.worker_calls import is_first_server

PAUSE_FACTOR = 4.0
"""Seconds of pause after each second of a load, while requests are under way: loads disturb their
tokens during a fifth of the time at most. Ours: `make load`; with 2, p99 was 1.7 times as long."""

MAX_PAUSE_SECONDS = 1.0
"""Ours: a large adapter's load, most of which is beside the engine, holds up others no longer."""


@dataclass(frozen=True, slots=True)
class _Registered:
    """An adapter that the engine has loaded; vLLM's registry does not have it yet."""

    adapter: ServedAdapter
    added: bool  # vLLM's answer
    unchanged: bool  # True: the engine had the same content under this name before


class AdapterRegistration:
    """Registers adapters in one API server process."""

    def __init__(self, controller: AdmissionController) -> None:
        self.controller = controller
        self.recent_decisions = RecentDecisions()
        self._audit = WorkThreads("audit", 1)
        self.served = ServedAdapters(controller, self._audit)
        self._tasks = Tasks()
        self._admissions = Admissions(controller, self._tasks)
        self._engine_load = EngineLoad(controller)
        self._inspections = Inspections(
            controller, self._admissions, self._engine_load, self._tasks
        )
        self._loads = WorkThreads("load", load_places(), self._count_waiting)

    def warm_up(self) -> None:
        """Prepare what the first adapter would wait for: statistics and a device's kernels."""
        if self.controller.policy.repair is not None:
            start_in_background(partial(preload_statistics, self.controller.policy))
        device = resolve_device(self.controller.settings.device)
        if device != "cpu":
            start_in_background(partial(warm_up, device, stop_at_exit))

    async def add_lora(
        self, engine: Any, request: Any, original: Callable[..., Awaitable[bool]]
    ) -> bool:
        """Register an adapter with the engine; replaces vLLM's `AsyncLLM.add_lora`.

        The request continues with the path of the stored copy. vLLM keeps that path, so later
        loads and prefix-cache blocks belong to this content and verdict.

        Raises:
            TooLong: its name or path is longer than any may be.
            AdapterRejected: the adapter is refused; the engine serves nothing of it.
            LoadPostponed: too many loads are asked for; the adapter was not looked at.
        """
        check_lengths(request.lora_name, request.lora_path)
        tenant = tenant_of(request.lora_name)
        try:
            attempt = await self._admissions.begin(engine, request, original, tenant)
            await self._loads.queue.enter(tenant)
        except AdapterRejected as refusal:
            await self._record(engine, self._admissions.unread(request, refusal), tenant)
            raise
        except LoadPostponed as postponed:
            note_retry(postponed.retry_seconds)
            reason = "rate" if isinstance(postponed, RateExceeded) else "queue"
            self.controller.events.metrics.postponed_loads.labels(reason).inc()
            raise
        started = time.monotonic()
        work = self._tasks.start(self._register(attempt))
        work.add_done_callback(
            lambda _: self._loads.queue.leave(tenant, _pause(engine, time.monotonic() - started))
        )
        try:
            registered = await asyncio.shield(work)
        except asyncio.CancelledError:
            attempt.is_abandoned = True
            self._tasks.start(self._withdraw(engine, work))
            raise
        # Nothing is awaited from here until vLLM has the adapter in its own registry.
        self.served.add(engine, registered.adapter)
        return registered.added

    async def dry_run(self, engine: Any, name: str, path: str) -> Verdict:
        """The verdict that registration would give; see `Inspections.dry_run`."""
        verdict = await self._inspections.dry_run(engine, name, path)
        await self._audit.run(self.controller.events.scanned, verdict, requester.get())
        return verdict

    async def recheck(self, engine: Any) -> list[tuple[ServedAdapter, Verdict]]:
        """Each served adapter, and the verdict that it would get; see `Inspections.recheck`."""
        return await self._inspections.recheck(engine, self.served)

    def check_unload(self, name: str) -> None:
        """Check that the client whose request this task serves may unload an adapter.

        Raises:
            TooLong: the name is longer than any may be.
            NotTheOwner: the policy gives the name to others.
        """
        check_lengths(name)
        served = self.served.get(name)
        if served is None or served.experiment is not None:  # those have names of their own
            return
        policy = self.controller.reload_policy()
        foreign = foreign_unload(policy.owners, name, asked_with())
        if foreign and policy.mode == "enforce":
            raise foreign

    async def _register(self, attempt: Attempt) -> _Registered:
        """Decide, load and record. It runs to its end whether or not the client waits.

        Raises:
            AdapterRejected: the adapter is refused.
            CancelledError: nobody waits for the answer any more.
        """
        engine, request, origin = attempt.engine, attempt.request, attempt.request.lora_path
        verdict, path = await self._admissions.admit(attempt, self._loads)
        if path is None:
            await self._record(engine, verdict, attempt.tenant)
            raise verdict.refusal
        before = self.served.get(request.lora_name)
        unchanged = self._engine_load.choose_id(request, path, before)
        try:
            attempt.check_wanted()
            await self._admissions.send_policy(engine)
            added, refusal = await self._engine_load.load(
                engine, request, attempt.original, origin=verdict.path, unchanged=unchanged
            )
            verdict = with_rejection(verdict, refusal) if refusal else verdict
            attempt.check_wanted()
            await self._record_load(engine, verdict, attempt.tenant, path)
            attempt.check_wanted()
        except BaseException as failure:
            request.lora_path = origin
            self._report_failure(verdict, path, failure)
            await self._engine_load.drop(engine, request.lora_int_id, path, unchanged=unchanged)
            raise
        adapter = ServedAdapter(request.lora_int_id, path, origin, verdict, experiment.get())
        return _Registered(adapter, added, unchanged)

    async def _withdraw(self, engine: Any, work: asyncio.Task[_Registered]) -> None:
        """Undo a registration whose client left before vLLM could note it."""
        await asyncio.wait([work])
        if work.cancelled() or work.exception() is not None:
            return
        found, one = work.result(), work.result().adapter
        self._report_failure(one.verdict, one.path, asyncio.CancelledError())
        await self._engine_load.drop(engine, one.adapter_id, one.path, unchanged=found.unchanged)

    async def _record_load(self, engine: Any, verdict: Verdict, tenant: str, path: Path) -> None:
        """Report the decision on an adapter that the engine has loaded.

        Raises:
            Refused: a worker refuses it.
            AuditFailed: the policy requires the report, and it cannot be written.
        """
        written = await self._record(engine, verdict, tenant, path)
        if is_refused(verdict):
            raise verdict.refusal
        if not written and self.controller.policy.audit.required and verdict.mode == "enforce":
            raise AuditFailed("the decision could not be written down")

    async def _record(
        self, engine: Any, verdict: Verdict, tenant: str, stored: Path | None = None
    ) -> bool:
        """Report a decision; whether it was written to the audit log."""
        self.recent_decisions.add(verdict)
        if is_refused(verdict):
            self._admissions.rates.count_refusal(tenant, self.controller.policy.rates)
        # Every API server registers the static adapters; one of them reports each decision.
        if door.get() == "static" and not is_refused(verdict) and not is_first_server(engine):
            return True
        decided = self.controller.events.decided
        report = partial(decided, stored=stored, asked_by=requester.get())
        return await self._audit.run(report, verdict, door.get())

    def _report_failure(self, verdict: Verdict, path: Path, failure: BaseException) -> None:
        """Report a load that failed after admission; a refusal was reported as the decision."""
        if isinstance(failure, AdapterRejected):
            return
        asked_by = requester.get()
        report = partial(self.controller.events.load_failed, stored=path, asked_by=asked_by)
        self._audit.start(partial(report, verdict, door.get(), failure))

    def _count_waiting(self, count: int) -> None:
        self.controller.events.metrics.set_waiting_loads(count)


def _pause(engine: Any, seconds: float) -> float:
    """How long the next load waits after one, so that requests under way get their share."""
    if not compat.has_requests(engine):
        return 0.0
    return min(PAUSE_FACTOR * seconds, MAX_PAUSE_SECONDS)
