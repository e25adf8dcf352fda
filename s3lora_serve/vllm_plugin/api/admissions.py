"""Decisions in the API server: what precedes them (rates, model, download), and their threads."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from s3lora_serve.admission.verdict import Verdict, unread_verdict, with_rejection
from s3lora_serve.errors import AdapterRejected, DeadlinePassed, Reason
from s3lora_serve.policy.text import check_text
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.api.rates import TenantRates
from s3lora_serve.vllm_plugin.api.registration import Attempt, Registration
from s3lora_serve.vllm_plugin.api.tasks import Tasks
from s3lora_serve.vllm_plugin.api.work_threads import WorkThreads
from s3lora_serve.vllm_plugin.api.worker_calls import call_workers
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.model_modules import ModelModules

MAX_DOWNLOADS = 8
"""Downloads at the same time. Hanging downloads delay only downloads."""


class Admissions:
    """Has adapters decided on, whoever asks and whatever becomes of them."""

    def __init__(
        self, process: GuardedProcess, controller: AdmissionController, tasks: Tasks
    ) -> None:
        self.rates = TenantRates()
        self._process = process
        self._controller = controller
        self._tasks = tasks
        self._modules: asyncio.Task[ModelModules] | None = None
        self._workers_policy: str | None = None  # digest of the policy that workers have loaded
        self._downloads = WorkThreads("download", MAX_DOWNLOADS)

    async def begin(
        self,
        registration: Registration,
        engine: Any,
        request: Any,
        original: Callable[..., Awaitable[bool]],
    ) -> Attempt:
        """What precedes a place in a queue: the rates, the model's modules, a hub id's download.

        Raises:
            DeadlinePassed: the download took longer than limits.download_seconds.
            LoadPostponed: the tenant asks for too much, or too many downloads wait.
        """
        if registration.door != "static":
            self.rates.count_load(registration.tenant, self._process.policy.rates)
        modules = await self.model(engine)
        downloaded = await self._downloaded(request, registration.tenant)
        return Attempt(registration, engine, request, original, modules, downloaded)

    async def model(self, engine: Any) -> ModelModules:
        """The model's modules: the workers are asked once."""
        if self._modules is None or (self._modules.done() and self._modules.exception()):
            self._modules = self._tasks.start(self._ask_for_model(engine))
        return await asyncio.shield(self._modules)

    async def _ask_for_model(self, engine: Any) -> ModelModules:
        return self._controller.learn_model(await call_workers(engine, "s3lora_model"))

    async def _downloaded(self, request: Any, tenant: str) -> Path | None:
        """The folder of a hub id; None for a path of this machine, and if the policy has roots."""
        limits = self._process.policy.limits
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

    async def admit(self, attempt: Attempt, threads: WorkThreads) -> tuple[Verdict, Path | None]:
        """The verdict, and the stored copy that workers may load (None if refused), pinned.

        The caller's task must not be cancelled: the pin is in the answer.

        Raises:
            LoRAAdapterNotFoundError: there is no such folder.
        """
        try:
            check_text(attempt.request.lora_name, attempt.request.lora_path)
            return await threads.run(self._decide, attempt)
        except AdapterRejected as refusal:
            return self.unread(attempt.request, refusal), None

    def _decide(self, attempt: Attempt) -> tuple[Verdict, Path | None]:
        """Runs on a thread: finding the folder may take as long as reading it."""
        folder = attempt.downloaded or compat.local_folder(attempt.request)
        if folder is None:
            raise compat.not_found(attempt.request)
        return self._controller.admit(
            folder,
            attempt.request.lora_name,
            compat.base_model(attempt.engine.vllm_config),
            attempt.modules,
            store_refused=False,
            experiment=attempt.registration.experiment,
            asked_with=attempt.registration.asked_with,
        )

    def unread(self, request: Any, refusal: AdapterRejected) -> Verdict:
        """The verdict on an adapter that is refused before it is read."""
        unread = unread_verdict(request.lora_name, request.lora_path, self._process.policy)
        return with_rejection(unread, Reason.of(refusal))

    async def send_policy(self, engine: Any) -> None:
        """Have the workers reload the policy once this process has a changed one."""
        if self._workers_policy != (digest := self._process.policy.digest):
            self._workers_policy = digest
            await call_workers(engine, "s3lora_refresh")
