"""Registrations in the API server: verdicts are made before any worker hears of the adapter.

They are made off the engine's loop, so that other tenants' tokens do not wait.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3lora_serve.admission.repairing import preload_statistics
from s3lora_serve.admission.verdict import Verdict, with_rejection
from s3lora_serve.errors import AdapterRejected, LoadPostponed, Reason, S3LoRAError
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.owners import foreign_unload
from s3lora_serve.policy.schema import Policy
from s3lora_serve.spectral import resolve_device, warm_up
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.api.admissions import Admissions
from s3lora_serve.vllm_plugin.api.client import asked_by
from s3lora_serve.vllm_plugin.api.decision_reports import DecisionReports
from s3lora_serve.vllm_plugin.api.engine_load import EngineLoad
from s3lora_serve.vllm_plugin.api.inspections import Inspections
from s3lora_serve.vllm_plugin.api.rates import tenant_of
from s3lora_serve.vllm_plugin.api.registration import Attempt, Registration, current
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters
from s3lora_serve.vllm_plugin.api.tasks import Tasks
from s3lora_serve.vllm_plugin.api.work_threads import (
    WorkThreads,
    load_places,
    start_in_background,
    stop_at_exit,
)
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopy

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


class AdapterRegistrations:
    """Registers adapters in one API server process."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        audit = WorkThreads("audit", 1)
        self.served = ServedAdapters(process, audit)
        self._tasks = Tasks()
        controller = AdmissionController(process)
        self._admissions = Admissions(process, controller, self._tasks)
        self._engine_load = EngineLoad(process)
        self._inspections = Inspections(
            controller, self._admissions, self._engine_load, self._tasks
        )
        self.reports = DecisionReports(process, self._admissions.rates, audit)
        self._loads = WorkThreads("load", load_places(), self.reports.waiting)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._process.policy

    @property
    def policy_problem(self) -> str | None:
        """Why the policy's file as it is now was not taken."""
        return self._process.policy_problem

    def reload_policy(self) -> Policy:
        """The policy in force after a look at its file."""
        return self._process.reload_policy()

    def on_policy_change(self, listener: Callable[[], object]) -> None:
        """Have a listener called, in another thread, when a changed policy is in force."""
        self._process.policy_changed = listener

    def warm_up(self) -> None:
        """Prepare what the first adapter would wait for: statistics and a device's kernels."""
        if self._process.policy.repair is not None:
            start_in_background(partial(preload_statistics, self._process.policy))
        device = resolve_device(self._process.settings.device)
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
        registration = current()
        registration.refusal = None
        try:
            return await self._add(registration, engine, request, original)
        except S3LoRAError as refusal:
            registration.refusal = Reason.of(refusal)
            raise

    async def _add(
        self,
        registration: Registration,
        engine: Any,
        request: Any,
        original: Callable[..., Awaitable[bool]],
    ) -> bool:
        check_lengths(request.lora_name, request.lora_path)
        registration.tenant = tenant = tenant_of(request.lora_name)
        try:
            attempt = await self._admissions.begin(registration, engine, request, original)
            await self._loads.queue.enter(tenant)
        except AdapterRejected as refusal:
            unread = self._admissions.unread(request, refusal)
            await self.reports.decided(registration, engine, unread)
            raise
        except LoadPostponed as postponed:
            self.reports.postponed(postponed)
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
            self._tasks.start(self._withdraw(attempt, work))
            raise
        # Nothing is awaited from here until vLLM has the adapter in its own registry.
        self.served.add(engine, registered.adapter)
        return registered.added

    async def dry_run(self, engine: Any, name: str, path: str) -> Verdict:
        """The verdict that registration would give; see `Inspections.dry_run`."""
        verdict = await self._inspections.dry_run(engine, name, path)
        await self.reports.scanned(verdict)
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
        policy = self._process.reload_policy()
        asks = asked_by()
        foreign = foreign_unload(policy.owners, name, None if asks is None else asks.key or "")
        if foreign and policy.mode == "enforce":
            raise foreign

    async def _register(self, attempt: Attempt) -> _Registered:
        """Decide, load and record. It runs to its end whether or not the client waits.

        Raises:
            AdapterRejected: the adapter is refused.
            CancelledError: nobody waits for the answer any more.
        """
        registration, engine, request = attempt.registration, attempt.engine, attempt.request
        origin = request.lora_path
        verdict, path = await self._admissions.admit(attempt, self._loads)
        if path is None:
            await self.reports.decided(registration, engine, verdict)
            raise verdict.refusal
        before = self.served.get(request.lora_name)
        unchanged = self._engine_load.choose_id(request, path, before.copy if before else None)
        try:
            attempt.check_wanted()
            await self._admissions.send_policy(engine)
            added, refusal = await self._engine_load.load(
                engine, request, attempt.original, origin=verdict.path, unchanged=unchanged
            )
            verdict = with_rejection(verdict, refusal) if refusal else verdict
            attempt.check_wanted()
            await self.reports.loaded(registration, engine, verdict, path)
            attempt.check_wanted()
        except BaseException as failure:
            request.lora_path = origin
            self.reports.load_failed(registration, verdict, path, failure)
            copy = PinnedCopy(request.lora_int_id, path)
            await self._engine_load.drop(engine, copy, unchanged=unchanged)
            raise
        copy = PinnedCopy(request.lora_int_id, path)
        adapter = ServedAdapter(copy, origin, verdict, registration.experiment)
        return _Registered(adapter, added, unchanged)

    async def _withdraw(self, attempt: Attempt, work: asyncio.Task[_Registered]) -> None:
        """Undo a registration whose client left before vLLM could note it."""
        await asyncio.wait([work])
        if work.cancelled() or work.exception() is not None:
            return
        found, one = work.result(), work.result().adapter
        left = asyncio.CancelledError()
        self.reports.load_failed(attempt.registration, one.verdict, one.path, left)
        await self._engine_load.drop(attempt.engine, one.copy, unchanged=found.unchanged)


def _pause(engine: Any, seconds: float) -> float:
    """How long the next load waits after one, so that requests under way get their share."""
    if not compat.has_requests(engine):
        return 0.0
    return min(PAUSE_FACTOR * seconds, MAX_PAUSE_SECONDS)
