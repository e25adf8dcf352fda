"""Registration in the API server: the verdict is made here, before any worker hears of the adapter.

It is made off the engine's loop, so that other tenants' tokens do not wait.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from s3lora_serve.admission.verdict import Verdict, is_refused, unread_verdict, with_rejection
from s3lora_serve.errors import (
    AdapterRejected,
    AuditFailed,
    DeadlinePassed,
    GateFailed,
    Reason,
    Refused,
)
from s3lora_serve.policy.text import check_text
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController, Experiment
from s3lora_serve.vllm_plugin.api.recent_decisions import RecentDecisions
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters
from s3lora_serve.vllm_plugin.api.worker_calls import call_workers, is_first_server
from s3lora_serve.vllm_plugin.threads import use_cores

MAX_ADMISSIONS = 2
"""Adapters decided on at the same time: a slow one does not hold up the next."""

MAX_SCORING_THREADS = 4
"""Threads that score one adapter, on machines with four times as many cores or more."""

MAX_DOWNLOADS = 8
"""Downloads at the same time, in a pool of their own: hanging downloads delay only downloads."""

FIRST_REPLACEMENT_ID = 2**30
"""Ids from here on are for replaced adapters. vLLM counts its own from 1, in 32 bits."""

POLL_SECONDS = 0.005
"""Interval between questions whether workers have preloaded a copy, which takes 10 ms or more."""

door: ContextVar[str] = ContextVar("door", default="engine")
"""The door (load route, resolver, static list) of the adapter that this task registers."""

experiment: ContextVar[Experiment | None] = ContextVar("experiment", default=None)
"""The settings of the experiment that this task registers, if it does."""


def _limit_cores() -> None:
    """Use few cores: idle engines spin on the others, and parallel sums would wait for them."""
    use_cores(min(MAX_SCORING_THREADS, max(1, (os.cpu_count() or 1) // 4)))


class AdapterRegistration:
    """Registers adapters in one API server process."""

    def __init__(self, controller: AdmissionController) -> None:
        self.controller = controller
        self.recent_decisions = RecentDecisions()
        self.served = ServedAdapters(controller)
        self._shapes: set[tuple[int, int]] | None = None
        self._workers_policy: str | None = None  # digest of the policy that workers have loaded
        self._threads = ThreadPoolExecutor(MAX_ADMISSIONS, "s3lora", initializer=_limit_cores)
        self._downloads = ThreadPoolExecutor(MAX_DOWNLOADS, thread_name_prefix="s3lora-hub")
        self._ids = count(FIRST_REPLACEMENT_ID)

    async def add_lora(
        self, engine: Any, request: Any, original: Callable[..., Awaitable[bool]]
    ) -> bool:
        """Register an adapter with the engine; replaces vLLM's `AsyncLLM.add_lora`.

        The request continues with the path of the stored copy. vLLM keeps that path, so later
        loads and prefix-cache blocks belong to this content and verdict. An adapter that replaces
        other content gets a new id: running requests finish with the adapter they began with.

        Raises:
            AdapterRejected: the adapter is refused; the engine serves nothing of it.
        """
        await self._learn_model(engine)
        origin = request.lora_path
        verdict, path = await self._admit(engine, request)
        added = False
        if path is not None:
            added, verdict = await self._load(engine, request, original, verdict, path)
        self.recent_decisions.add(verdict)
        written = True
        # Every API server registers the static adapters; one of them reports each decision.
        if door.get() != "static" or is_refused(verdict) or is_first_server(engine):
            written = await self._in_thread(self.controller.events.decided, verdict, door.get())
        if path is None or is_refused(verdict):
            raise Refused(str(verdict.reason))
        if not written and self.controller.policy.audit.required and verdict.mode == "enforce":
            await engine.remove_lora(request.lora_int_id)
            self.controller.store.unpin(path)
            raise Refused(str(AuditFailed("the decision could not be written down")))
        own = experiment.get()
        self.served.add(engine, ServedAdapter(request.lora_int_id, path, origin, verdict, own))
        return added

    async def dry_run(self, engine: Any, name: str, path: str) -> Verdict:
        """The verdict that registration would give, workers included; nothing is registered.

        Raises:
            LoRAAdapterNotFoundError: the folder does not exist.
        """
        await self._learn_model(engine)
        request = compat.request_for(name, path, FIRST_REPLACEMENT_ID)
        verdict, stored = await self._admit(engine, request)
        if stored is not None:
            try:
                copy = (name, str(stored), request.lora_int_id)
                await self._preload(engine, copy)
                answers = await call_workers(engine, "s3lora_trial", copy)
            finally:
                self.controller.store.unpin(stored)
            if reason := next((Reason(*answer) for answer in answers if answer), None):
                verdict = with_rejection(verdict, reason)
        return verdict

    async def recheck(self, engine: Any) -> list[tuple[ServedAdapter, Verdict]]:
        """Each served adapter, and the verdict that it would get now."""
        await self._learn_model(engine)
        base_model = compat.base_model(engine.vllm_config)
        recheck = partial(self.controller.recheck, base_model=base_model, shapes=self._shapes or ())
        return [
            (one, await self._in_thread(recheck, one.verdict, one.path, one.experiment))
            for one in self.served.all()
        ]

    async def _load(
        self,
        engine: Any,
        request: Any,
        original: Callable[..., Awaitable[bool]],
        verdict: Verdict,
        path: Path,
    ) -> tuple[bool, Verdict]:
        """Have the engine load a stored copy; its answer, and the verdict after the workers'."""
        origin, request.lora_path = request.lora_path, str(path)
        before = self.served.get(request.lora_name)
        replaced = before if request.load_inplace else None
        unchanged = replaced is not None and replaced.path == path
        if request.load_inplace:
            same_id = replaced.adapter_id if replaced is not None and unchanged else None
            request.lora_int_id = same_id or next(self._ids)
        # Loaded once: with load_inplace vLLM would read and activate it again at every step.
        request.load_inplace = False
        loaded = False
        try:
            own = request.lora_int_id, request.lora_name, str(path), verdict.path
            await call_workers(engine, "s3lora_registered", own)
            if not unchanged:
                await self._preload(engine, (request.lora_name, str(path), request.lora_int_id))
            added = await original(engine, request)
            if reason := await self._workers_refusal(engine, request, path.name):
                verdict = with_rejection(verdict, reason)
            loaded = not is_refused(verdict)
        finally:
            # Also on cancellation by the client: no unregistered adapter may stay under the id.
            if not loaded:
                request.lora_path = origin
                self.controller.store.unpin(path)
                if not unchanged:
                    await engine.remove_lora(request.lora_int_id)
        return added, verdict

    async def _admit(self, engine: Any, request: Any) -> tuple[Verdict, Path | None]:
        """The verdict, and the stored copy that workers may load (None if refused)."""
        admit = partial(self.controller.admit, store_refused=False, experiment=experiment.get())
        base_model = compat.base_model(engine.vllm_config)
        try:
            check_text(request.lora_name, request.lora_path)
            folder = await self._folder(request)
            admitted: tuple[Verdict, Path | None] = await self._in_thread(
                admit, folder, request.lora_name, base_model, self._shapes or ()
            )
        except AdapterRejected as error:
            name, path = request.lora_name, request.lora_path
            unread = unread_verdict(name, path, self.controller.policy)
            return with_rejection(unread, Reason.of(error)), None
        await self._send_policy(engine)
        return admitted

    async def _folder(self, request: Any) -> Path:
        """The adapter's folder; downloaded if its path is a hub id and the policy has no roots."""
        folder = compat.local_folder(request)
        limits = self.controller.policy.limits
        if folder is None and compat.is_hub_id(request) and not limits.roots:
            loop = asyncio.get_running_loop()
            download = loop.run_in_executor(self._downloads, compat.downloaded_folder, request)
            try:
                folder = await asyncio.wait_for(download, limits.download_seconds)
            except TimeoutError:
                raise DeadlinePassed(
                    f"downloading took over {limits.download_seconds:g} s (limits.download_seconds)"
                ) from None
        if folder is None:
            raise compat.not_found(request)
        return folder

    async def _learn_model(self, engine: Any) -> None:
        """Ask the workers once for the model's modules: their shapes, layers and projections."""
        if self._shapes is None:
            self._shapes = self.controller.learn_model(await call_workers(engine, "s3lora_model"))

    async def _send_policy(self, engine: Any) -> None:
        """Have the workers reload the policy once this process has a changed one."""
        if self._workers_policy != (digest := self.controller.policy.digest):
            self._workers_policy = digest
            await call_workers(engine, "s3lora_refresh")

    async def _preload(self, engine: Any, copy: tuple[str, str, int]) -> None:
        """Wait until every worker has read a stored copy (name, path, id) beside its steps."""
        while not all(await call_workers(engine, "s3lora_preloaded", copy)):
            await asyncio.sleep(POLL_SECONDS)

    async def _workers_refusal(self, engine: Any, request: Any, key: str) -> Reason | None:
        """Why a worker loaded the adapter without effect, or holds another one under its id."""
        answers = await call_workers(engine, "s3lora_loaded", (request.lora_int_id,))
        if reason := next((Reason(*refusal) for _, refusal in answers if refusal), None):
            return reason
        if all(loaded == key for loaded, _ in answers):
            return None
        return Reason.of(GateFailed("the engine holds another adapter under this id"))

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
