"""Registration in the API server: adapters are copied, scored and decided on before any worker
hears of them, off the engine's loop, so that other tenants' tokens do not wait."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from s3lora_serve.admission import admit
from s3lora_serve.errors import AdapterRejected, GateFailed, Reason
from s3lora_serve.policy import Policy
from s3lora_serve.settings import Settings
from s3lora_serve.store import Store
from s3lora_serve.verdict import Verdict, refused, rejected
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.recorder import Recorder

MOST_REMEMBERED = 1000
"""Verdicts kept for those who ask; tenants choose the names."""

AT_A_TIME = 2
"""Adapters decided on side by side: one that takes long does not keep the others waiting."""

door: ContextVar[str] = ContextVar("door", default="engine")
"""By which door the adapter came that this task registers."""


class Refused(AdapterRejected):
    """A refusal on its way through vLLM, which keeps only the text."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


class Registrar:
    """The gate of one API server process."""

    def __init__(self, policy: Policy, settings: Settings) -> None:
        self._policy = policy
        self._settings = settings
        self._store = Store(settings.state_dir)
        self._recorder: Recorder | None = None
        self._shapes: set[tuple[int, int]] = set()
        self._threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="s3lora")
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()

    def verdict(self, name: str) -> Verdict | None:
        """The last decision on the adapter of this name."""
        return self._verdicts.get(name)

    async def add_lora(
        self, engine: Any, request: Any, original: Callable[..., Awaitable[bool]]
    ) -> bool:
        """Register an adapter with the engine, in the place of vLLM's `AsyncLLM.add_lora`.

        The request leaves with the path of the admitted copy: vLLM keeps it, so every later load
        and every prefix-cache block belong to that content and ruling.

        Raises:
            AdapterRejected: it is not admitted; the engine serves nothing of it.
        """
        recorder = await self._ready(engine)
        loop = asyncio.get_running_loop()
        verdict, path = await loop.run_in_executor(self._threads, self._decide, engine, request)
        added = False
        if path is not None:
            asked, request.lora_path = request.lora_path, str(path)
            added = await original(engine, request)
            if reason := await self._refusal_of_workers(engine, request):
                verdict = rejected(verdict, reason)
            if refused(verdict):
                # Workers hold it without effect; they need not hold it at all.
                await engine.remove_lora(request.lora_int_id)
                request.lora_path = asked
        self._remember(verdict)
        recorder.decided(verdict, door.get())
        if path is None or refused(verdict):
            raise Refused(str(verdict.reason))
        # Read once: vLLM would read and activate it again at each of its steps.
        request.load_inplace = False
        return added

    def _decide(self, engine: Any, request: Any) -> tuple[Verdict, Path | None]:
        """The decision, and where the copy lies that workers may load."""
        folder = compat.adapter_folder(request, download=not self._policy.limits.roots)
        if folder is None:
            raise compat.not_found(request)
        with self._store.fresh() as private:
            verdict = admit(
                folder,
                request.lora_name,
                self._policy,
                base_model=compat.base_model(engine.vllm_config),
                device=self._settings.device,
                into=private.make,
                shapes=self._shapes,
            ).verdict
            if refused(verdict):
                return verdict, None
            try:
                return verdict, self._store.keep(private, verdict)
            except GateFailed as error:
                return rejected(verdict, Reason.of(error)), None

    async def _ready(self, engine: Any) -> Recorder:
        """The recorder, which counts by the layers and projections that the workers have."""
        if self._recorder is None:
            recorder = Recorder(self._policy, self._settings)
            ranks = await engine.collective_rpc("s3lora_model")
            recorder.metrics.know_model(
                {tuple(place) for rank in ranks for place in rank["places"]}
            )
            self._shapes = {(m, n) for rank in ranks for m, n in rank["shapes"]}
            self._recorder = recorder
        return self._recorder

    async def _refusal_of_workers(self, engine: Any, request: Any) -> Reason | None:
        """Why a worker holds this adapter without effect, if one does."""
        answers = await engine.collective_rpc("s3lora_refusal", args=(request.lora_int_id,))
        return next((Reason(*answer) for answer in answers if answer), None)

    def _remember(self, verdict: Verdict) -> None:
        self._verdicts[verdict.name] = verdict
        self._verdicts.move_to_end(verdict.name)
        if len(self._verdicts) > MOST_REMEMBERED:
            self._verdicts.popitem(last=False)
