"""Registration in the API server: adapters are copied, scored and decided on before any worker
hears of them, off the engine's loop, so that other tenants' tokens do not wait."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AuditFailed, GateFailed, Reason
from s3lora_serve.verdict import Verdict, refused, rejected
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.desk import Desk, Refused, remember
from s3lora_serve.vllm_plugin.recorder import unknown

AT_A_TIME = 2
"""Adapters decided on side by side: one that takes long does not keep the others waiting."""

door: ContextVar[str] = ContextVar("door", default="engine")
"""By which door the adapter came that this task registers."""


class Registrar:
    """The gate of one API server process."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._shapes: set[tuple[int, int]] | None = None
        self._threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="s3lora")
        self._decisions: OrderedDict[str, str] = OrderedDict()

    def decision(self, name: str) -> str | None:
        """The last decision on the adapter of this name."""
        return self._decisions.get(name)

    async def add_lora(
        self, engine: Any, request: Any, original: Callable[..., Awaitable[bool]]
    ) -> bool:
        """Register an adapter with the engine, in the place of vLLM's `AsyncLLM.add_lora`.

        The request leaves with the path of the admitted copy: vLLM keeps it, so every later load
        and every prefix-cache block belong to that content and ruling.

        Raises:
            AdapterRejected: it is not admitted; the engine serves nothing of it.
        """
        shapes = await self._know_model(engine)
        decision = asyncio.get_running_loop().run_in_executor(
            self._threads, self._decide, request, compat.base_model(engine.vllm_config), shapes
        )
        verdict, path = await decision
        added = False
        if path is not None:
            asked, request.lora_path = request.lora_path, str(path)
            try:
                added = await original(engine, request)
                if reason := await self._refusal_of_workers(engine, request, path.name):
                    verdict = rejected(verdict, reason)
            except BaseException:
                request.lora_path = asked
                # Also when the client has gone: what nobody registered must not stay under the id.
                await engine.remove_lora(request.lora_int_id)
                raise
            if refused(verdict):
                # Workers hold it without effect; they need not hold it at all.
                await engine.remove_lora(request.lora_int_id)
                request.lora_path = asked
        remember(self._decisions, verdict.name, verdict.decision.value)
        self._desk.recorder.decided(verdict, door.get())
        if path is None or refused(verdict):
            raise Refused(str(verdict.reason))
        # Read once: vLLM would read and activate it again at each of its steps.
        request.load_inplace = False
        return added

    def _decide(
        self, request: Any, base_model: str | None, shapes: set[tuple[int, int]]
    ) -> tuple[Verdict, Path | None]:
        """The decision, and where the copy lies that workers may load, if they may."""
        policy = self._desk.policy
        folder = compat.adapter_folder(request, download=not policy.limits.roots)
        if folder is None:
            raise compat.not_found(request)
        try:
            return self._desk.decide(
                folder, request.lora_name, base_model, shapes, keep_refused=False
            )
        except (AuditFailed, GateFailed) as error:
            reason = Reason.of(error)
            return rejected(unknown(request.lora_name, str(folder), policy), reason), None

    async def _know_model(self, engine: Any) -> set[tuple[int, int]]:
        """The shapes of the model's modules; metrics count by their layers and projections."""
        if self._shapes is None:
            ranks = await engine.collective_rpc("s3lora_model")
            places = {tuple(place) for rank in ranks for place in rank["places"]}
            self._desk.recorder.metrics.know_model(places)
            self._shapes = {(m, n) for rank in ranks for m, n in rank["shapes"]}
        return self._shapes

    async def _refusal_of_workers(self, engine: Any, request: Any, key: str) -> Reason | None:
        """Why a worker holds this adapter without effect, or holds another under its id."""
        number = (request.lora_int_id,)
        answers = await engine.collective_rpc("s3lora_refusal", args=number)
        if refusal := next((Reason(*answer) for answer in answers if answer), None):
            return refusal
        if all(held == key for held in await engine.collective_rpc("s3lora_holds", args=number)):
            return None
        return Reason.of(GateFailed("the engine holds another adapter under this id"))
