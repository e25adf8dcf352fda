"""Registration in the API server: the verdict is made here, before any worker hears of the adapter.

It is made off the engine's loop, so that other tenants' tokens do not wait.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from s3lora_serve.admission.verdict import Verdict, is_refused, unread_verdict, with_rejection
from s3lora_serve.errors import (
    AdapterRejected,
    AuditFailed,
    DeadlinePassed,
    LoadPostponed,
    RateExceeded,
    Reason,
    Refused,
)
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.owners import foreign_unload
from s3lora_serve.policy.text import check_text
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController, Experiment
from s3lora_serve.vllm_plugin.api.engine_load import EngineLoad
from s3lora_serve.vllm_plugin.api.rates import TenantRates, tenant_of
from s3lora_serve.vllm_plugin.api.recent_decisions import RecentDecisions
from s3lora_serve.vllm_plugin.api.requester import asked_with, note_retry, requester
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters
from s3lora_serve.vllm_plugin.api.work_threads import WorkThreads, load_places
from s3lora_serve.vllm_plugin.api.worker_calls import call_workers, is_first_server
from s3lora_serve.vllm_plugin.model_modules import ModelModules

MAX_DOWNLOADS = 8
"""Downloads at the same time. Hanging downloads delay only downloads."""

T = TypeVar("T")

door: ContextVar[str] = ContextVar("door", default="engine")
"""The door (load route, resolver, static list) of the adapter that this task registers."""

experiment: ContextVar[Experiment | None] = ContextVar("experiment", default=None)
"""The settings of the experiment that this task registers, if it does."""


PAUSE_FACTOR = 2.0
"""Seconds of pause after each second of a load, while requests are under way: loads disturb their
tokens during a third of the time at most. Ours."""

MAX_PAUSE_SECONDS = 0.5
"""Ours: a large adapter's load, most of which is beside the engine, holds up others no longer."""


def _pause(engine: Any, seconds: float) -> float:
    """How long the next load waits after one, so that requests under way get their share."""
    if not compat.has_requests(engine):
        return 0.0
    return min(PAUSE_FACTOR * seconds, MAX_PAUSE_SECONDS)


@dataclass(slots=True)
class _Attempt:
    """One registration that is under way."""

    engine: Any
    request: Any  # vLLM's LoRARequest
    original: Callable[..., Awaitable[bool]]  # vLLM's own add_lora
    modules: ModelModules
    tenant: str
    downloaded: Path | None  # the folder, if the path is a hub id
    is_abandoned: bool = False  # True: the client left

    def check_wanted(self) -> None:
        """Check that the client still waits.

        Raises:
            CancelledError: it does not.
        """
        if self.is_abandoned:
            raise asyncio.CancelledError


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
        self._engine_load = EngineLoad(controller)
        self._rates = TenantRates()
        self._modules: asyncio.Future[ModelModules] | None = None
        self._workers_policy: str | None = None  # digest of the policy that workers have loaded
        self._loads = WorkThreads("load", load_places(), self._count_waiting)
        self._inspections = WorkThreads("inspect", 1)
        self._downloads = WorkThreads("download", MAX_DOWNLOADS)
        self._tasks: set[asyncio.Task[Any]] = set()

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
            attempt = await self._begun(engine, request, original, tenant)
            await self._loads.queue.enter(tenant)
        except LoadPostponed as postponed:
            note_retry(postponed.retry_seconds)
            reason = "rate" if isinstance(postponed, RateExceeded) else "queue"
            self.controller.events.metrics.postponed_loads.labels(reason).inc()
            raise
        work = self._spawn(self._register(attempt))
        started = time.monotonic()
        work.add_done_callback(
            lambda _: self._loads.queue.leave(tenant, _pause(engine, time.monotonic() - started))
        )
        try:
            registered = await asyncio.shield(work)
        except asyncio.CancelledError:
            attempt.is_abandoned = True
            self._spawn(self._withdraw(engine, work))
            raise
        # Nothing is awaited from here until vLLM has the adapter in its own registry.
        self.served.add(engine, registered.adapter)
        return registered.added

    async def _begun(
        self,
        engine: Any,
        request: Any,
        original: Callable[..., Awaitable[bool]],
        tenant: str,
    ) -> _Attempt:
        """A registration or dry scan before its place in a queue; hub ids are downloaded."""
        if door.get() != "static":
            self._rates.count_load(tenant, self.controller.policy.rates)
        modules = await self._learn_model(engine)
        try:
            downloaded = await self._downloaded(request, tenant)
        except AdapterRejected as refusal:
            await self._record(engine, self._unread(request, refusal), tenant)
            raise
        return _Attempt(engine, request, original, modules, tenant, downloaded)

    async def dry_run(self, engine: Any, name: str, path: str) -> Verdict:
        """The verdict that registration would give, workers included; nothing is registered.

        Raises:
            LoRAAdapterNotFoundError: the folder does not exist.
            LoadPostponed: as `add_lora`.
        """
        tenant = tenant_of(name)
        request = compat.request_for(name, path, 1)
        attempt = await self._begun(engine, request, engine.add_lora, tenant)
        await self._inspections.queue.enter(tenant)
        work = self._spawn(self._try(attempt))
        work.add_done_callback(lambda _: self._inspections.queue.leave(tenant))
        return await asyncio.shield(work)

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

    async def recheck(self, engine: Any) -> list[tuple[ServedAdapter, Verdict]]:
        """Each served adapter, and the verdict that it would get now.

        Raises:
            LoadPostponed: too many scans and rechecks wait already.
        """
        modules = await self._learn_model(engine)
        base_model = compat.base_model(engine.vllm_config)
        recheck = partial(self.controller.recheck, base_model=base_model, modules=modules)
        found = []
        for one in self.served.all():
            async with self._inspections.queue.place("recheck"):
                now = await self._inspections.run(recheck, one.verdict, one.path, one.experiment)
            found.append((one, now))
        return found

    async def _register(self, attempt: _Attempt) -> _Registered:
        """Decide, load and record. It runs to its end whether or not the client waits.

        Raises:
            AdapterRejected: the adapter is refused.
            CancelledError: nobody waits for the answer any more.
        """
        engine, request = attempt.engine, attempt.request
        origin, path = request.lora_path, None
        added = unchanged = False
        try:
            verdict, path = await self._admit(attempt, self._loads)
            if path is not None:
                attempt.check_wanted()
                before = self.served.get(request.lora_name)
                unchanged = self._engine_load.choose_id(request, path, before)
                await self._engine_load.note_origin(engine, request, verdict.path)
                added, refusal = await self._engine_load.load(
                    engine, request, attempt.original, unchanged=unchanged
                )
                verdict = with_rejection(verdict, refusal) if refusal else verdict
            written = await self._record(engine, verdict, attempt.tenant, path)
            if path is None or is_refused(verdict):
                raise Refused(str(verdict.reason))
            if not written and self.controller.policy.audit.required and verdict.mode == "enforce":
                raise AuditFailed("the decision could not be written down")
            attempt.check_wanted()
        except BaseException as failure:
            request.lora_path = origin
            if path is not None:
                self._report_failure(verdict, path, failure)
                await self._engine_load.drop(engine, request.lora_int_id, path, unchanged=unchanged)
            raise
        adapter = ServedAdapter(request.lora_int_id, path, origin, verdict, experiment.get())
        return _Registered(adapter, added, unchanged)

    async def _withdraw(self, engine: Any, work: asyncio.Task[_Registered]) -> None:
        """Undo a registration whose client left before vLLM could note it."""
        await asyncio.wait([work])
        if not work.cancelled() and work.exception() is None:
            found = work.result()
            one = found.adapter
            self._report_failure(one.verdict, one.path, asyncio.CancelledError())
            await self._engine_load.drop(
                engine, one.adapter_id, one.path, unchanged=found.unchanged
            )

    async def _try(self, attempt: _Attempt) -> Verdict:
        """The verdict on an adapter, workers included; nothing of it stays."""
        verdict, stored = await self._admit(attempt, self._inspections)
        if stored is not None:
            try:
                reason = await self._engine_load.trial(attempt.engine, verdict.name, stored)
            finally:
                self.controller.store.unpin(stored)
            verdict = with_rejection(verdict, reason) if reason else verdict
        return verdict

    async def _admit(self, attempt: _Attempt, threads: WorkThreads) -> tuple[Verdict, Path | None]:
        """The verdict, and the stored copy that workers may load (None if refused), pinned."""
        try:
            # Over HTTP somebody asks, also where no middleware notes who: owners' keys are checked.
            check_text(attempt.request.lora_name, attempt.request.lora_path)
            in_process = asked_with() is None and door.get() in ("static", "engine")
            asks = None if in_process else asked_with() or ""
            admitted = await threads.run(self._decide, attempt, experiment.get(), asks)
        except AdapterRejected as refusal:
            return self._unread(attempt.request, refusal), None
        await self._send_policy(attempt.engine)
        return admitted

    def _decide(
        self, attempt: _Attempt, settings: Experiment | None, asks: str | None
    ) -> tuple[Verdict, Path | None]:
        """Runs on a thread: finding the folder may take as long as reading it."""
        folder = attempt.downloaded or compat.local_folder(attempt.request)
        if folder is None:
            raise compat.not_found(attempt.request)
        return self.controller.admit(
            folder,
            attempt.request.lora_name,
            compat.base_model(attempt.engine.vllm_config),
            attempt.modules,
            store_refused=False,
            experiment=settings,
            asked_with=asks,
        )

    async def _downloaded(self, request: Any, tenant: str) -> Path | None:
        """The folder of a hub id; None for a path of this machine, and if the policy has roots.

        Raises:
            DeadlinePassed: the download took longer than limits.download_seconds.
            QueueFull: too many downloads wait.
        """
        limits = self.controller.policy.limits
        if limits.roots or not compat.is_hub_id(request) or compat.local_folder(request):
            return None
        async with self._downloads.queue.place(tenant):
            try:
                async with asyncio.timeout(limits.download_seconds):
                    return await self._downloads.run(compat.downloaded_folder, request)
            except TimeoutError:
                raise DeadlinePassed(
                    f"downloading took over {limits.download_seconds:g} s (limits.download_seconds)"
                ) from None

    async def _learn_model(self, engine: Any) -> ModelModules:
        """The model's modules: the workers are asked once."""
        if self._modules is None or (self._modules.done() and self._modules.exception()):
            self._modules = self._spawn(self._ask_for_model(engine))
        return await asyncio.shield(self._modules)

    async def _ask_for_model(self, engine: Any) -> ModelModules:
        return self.controller.learn_model(await call_workers(engine, "s3lora_model"))

    async def _send_policy(self, engine: Any) -> None:
        """Have the workers reload the policy once this process has a changed one."""
        if self._workers_policy != (digest := self.controller.policy.digest):
            self._workers_policy = digest
            await call_workers(engine, "s3lora_refresh")

    async def report_scan(self, verdict: Verdict) -> None:
        """Write a dry scan's verdict to the audit log."""
        await self._audit.run(self.controller.events.scanned, verdict, requester.get())

    def _report_failure(self, verdict: Verdict, path: Path, failure: BaseException) -> None:
        """Report a load that failed after admission; a refusal was reported as the decision."""
        if isinstance(failure, AdapterRejected):
            return
        asked_by = requester.get()
        report = partial(self.controller.events.load_failed, stored=path, asked_by=asked_by)
        self._audit.start(partial(report, verdict, door.get(), failure))

    async def _record(
        self, engine: Any, verdict: Verdict, tenant: str, stored: Path | None = None
    ) -> bool:
        """Report a decision; whether it was written to the audit log."""
        self.recent_decisions.add(verdict)
        if is_refused(verdict):
            self._rates.count_refusal(tenant, self.controller.policy.rates)
        # Every API server registers the static adapters; one of them reports each decision.
        if door.get() == "static" and not is_refused(verdict) and not is_first_server(engine):
            return True
        decided = self.controller.events.decided
        report = partial(decided, stored=stored, asked_by=requester.get())
        return await self._audit.run(report, verdict, door.get())

    def _count_waiting(self, count: int) -> None:
        self.controller.events.metrics.set_waiting_loads(count)

    def _unread(self, request: Any, refusal: AdapterRejected) -> Verdict:
        unread = unread_verdict(request.lora_name, request.lora_path, self.controller.policy)
        return with_rejection(unread, Reason.of(refusal))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that no client's leaving cancels."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
