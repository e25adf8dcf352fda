"""Dry scans, and rechecks of what is served: decisions that change nothing."""

import asyncio
from functools import partial
from typing import Any

from s3lora_serve.admission.verdict import Verdict, with_rejection
from s3lora_serve.errors import AdapterRejected
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.api.admissions import Admissions
from s3lora_serve.vllm_plugin.api.engine_load import EngineLoad
from s3lora_serve.vllm_plugin.api.rates import tenant_of
from s3lora_serve.vllm_plugin.api.registration import Attempt, Registration
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters
from s3lora_serve.vllm_plugin.api.tasks import Tasks
from s3lora_serve.vllm_plugin.api.work_threads import WorkThreads


class Inspections:
    """Decides in a thread of its own, so that loads do not wait."""

    def __init__(
        self,
        controller: AdmissionController,
        admissions: Admissions,
        engine_load: EngineLoad,
        tasks: Tasks,
    ) -> None:
        self._controller = controller
        self._admissions = admissions
        self._engine_load = engine_load
        self._tasks = tasks
        self._threads = WorkThreads("inspect", 1)

    async def dry_run(self, engine: Any, name: str, path: str) -> Verdict:
        """The verdict that registration would give, workers included; nothing is registered.

        Raises:
            LoRAAdapterNotFoundError: the folder does not exist.
            LoadPostponed: too many loads and scans are asked for.
        """
        registration = Registration("scan", tenant_of(name))
        request = compat.request_for(name, path, 1)
        try:
            attempt = await self._admissions.begin(registration, engine, request, engine.add_lora)
        except AdapterRejected as refusal:
            return self._admissions.unread(request, refusal)
        await self._threads.queue.enter(registration.tenant)
        work = self._tasks.start(self._try(attempt))
        work.add_done_callback(lambda _: self._threads.queue.leave(registration.tenant))
        return await asyncio.shield(work)

    async def _try(self, attempt: Attempt) -> Verdict:
        """The verdict on an adapter, workers included; nothing of it stays."""
        verdict, stored = await self._admissions.admit(attempt, self._threads)
        if stored is None:
            return verdict
        try:
            await self._admissions.send_policy(attempt.engine)
            reason = await self._engine_load.trial(attempt.engine, verdict.name, stored)
        finally:
            self._engine_load.unpin(stored)
        return with_rejection(verdict, reason) if reason else verdict

    async def recheck(
        self, engine: Any, served: ServedAdapters
    ) -> list[tuple[ServedAdapter, Verdict]]:
        """Each served adapter, and the verdict that it would get now.

        Raises:
            LoadPostponed: too many scans and rechecks wait already.
        """
        modules = await self._admissions.model(engine)
        base_model = compat.base_model(engine.vllm_config)
        recheck = partial(self._controller.recheck, base_model=base_model, modules=modules)
        found = []
        for one in served.all():
            async with self._threads.queue.place("recheck"):
                now = await self._threads.run(recheck, one.verdict, one.path, one.experiment)
            found.append((one, now))
        return found
