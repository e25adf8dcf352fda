"""Registration in the API server: adapters are copied, scored and decided on before any worker
hears of them, off the engine's loop, so that other tenants' tokens do not wait."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected, AuditFailed, DeadlinePassed, GateFailed, Reason
from s3lora_serve.policy import Policy
from s3lora_serve.verdict import Verdict, refused, rejected, unknown
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.decisions import Decisions
from s3lora_serve.vllm_plugin.desk import Desk, Refused
from s3lora_serve.vllm_plugin.served import Served, ServedAdapters
from s3lora_serve.vllm_plugin.threads import use_cores
from s3lora_serve.vllm_plugin.workers import ask_workers, is_first_server

AT_A_TIME = 2
"""Adapters decided on side by side: one that takes long does not keep the others waiting."""

MOST_THREADS = 4
"""Threads that score one adapter, on machines with four times as many cores or more."""

DOWNLOADS = 8
"""Downloads side by side, apart from decisions: those that hang close the door only to others."""

IN_PLACE_IDS = 2**30
"""From here on, ids for adapters that are replaced; vLLM counts its own from 1, in 32 bits."""

POLL_SECONDS = 0.005
"""How often workers are asked whether they have read an adapter; it takes tens of milliseconds."""

door: ContextVar[str] = ContextVar("door", default="engine")
"""By which door the adapter came that this task registers."""


def _leave_cores() -> None:
    """Engines spin on the other cores: every parallel sum would wait for one of those."""
    use_cores(min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 4)))


class Registrar:
    """The gate of one API server process."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._shapes: set[tuple[int, int]] | None = None
        self._told: str | None = None
        self._threads = ThreadPoolExecutor(AT_A_TIME, "s3lora", initializer=_leave_cores)
        self._downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="s3lora-hub")
        self._ids = count(IN_PLACE_IDS)
        self.decisions = Decisions()
        self.served = ServedAdapters(desk)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._desk.policy

    def is_quarantined(self, path: Path) -> bool:
        """Whether what is served from a path of the store has lost its update."""
        return self._desk.store.is_condemned(path)

    async def add_lora(
        self, engine: Any, request: Any, original: Callable[..., Awaitable[bool]]
    ) -> bool:
        """Register an adapter with the engine, in the place of vLLM's `AsyncLLM.add_lora`.

        The request leaves with the path of the admitted copy: vLLM keeps it, so every later load
        and every prefix-cache block belong to that content and ruling. What replaces other content
        gets an id of its own: requests under way end with the adapter they began with.

        Raises:
            AdapterRejected: it is not admitted; the engine serves nothing of it.
        """
        await self._know_model(engine)
        origin = request.lora_path
        verdict, path = await self._decided(engine, request)
        added = False
        if path is not None:
            added, verdict = await self._registered(engine, request, original, verdict, path)
        self.decisions.add(verdict)
        written = True
        # Each API server registers the static adapters; what they agree on counts once.
        if door.get() != "static" or refused(verdict) or is_first_server(engine):
            written = await self._in_thread(self._desk.recorder.decided, verdict, door.get())
        if path is None or refused(verdict):
            raise Refused(str(verdict.reason))
        if not written and self.policy.audit.required and verdict.mode == "enforce":
            await engine.remove_lora(request.lora_int_id)
            self._desk.store.release(path)
            raise Refused(str(AuditFailed("the decision could not be written down")))
        self.served.add(engine, Served(request.lora_int_id, path, origin, verdict))
        return added

    async def dry_run(self, engine: Any, name: str, path: str) -> Verdict:
        """What registration would decide, workers included; nothing is registered or counted.

        Raises:
            LoRAAdapterNotFoundError: there is no such folder.
        """
        await self._know_model(engine)
        request = compat.request_for(name, path, IN_PLACE_IDS)
        verdict, kept = await self._decided(engine, request)
        if kept is not None:
            try:
                asked = (name, str(kept), request.lora_int_id)
                await self._prepare(engine, asked)
                answers = await ask_workers(engine, "s3lora_trial", asked)
            finally:
                self._desk.store.release(kept)
            if reason := next((Reason(*answer) for answer in answers if answer), None):
                verdict = rejected(verdict, reason)
        return verdict

    async def recheck(self, engine: Any) -> list[tuple[Verdict, Verdict]]:
        """The verdict each served adapter was admitted with, and the one it would get now."""
        await self._know_model(engine)
        served = [(adapter.verdict, adapter.path) for adapter in self.served.all()]
        base_model = compat.base_model(engine.vllm_config)
        return [
            (
                before,
                await self._in_thread(self._desk.recheck, before, path, base_model, self._shapes),
            )
            for before, path in served
        ]

    async def _registered(
        self,
        engine: Any,
        request: Any,
        original: Callable[..., Awaitable[bool]],
        verdict: Verdict,
        path: Path,
    ) -> tuple[bool, Verdict]:
        """What the engine answers, and the verdict once its workers had their say."""
        origin, request.lora_path = request.lora_path, str(path)
        before = self.served.get(request.lora_name)
        replaces = before if request.load_inplace else None
        same = replaces is not None and replaces.path == path
        if request.load_inplace:
            number = replaces.number if replaces is not None and same else next(self._ids)
            request.lora_int_id = number
        # Read once: vLLM would read and activate it again at each of its steps.
        request.load_inplace = False
        taken = False
        try:
            if not same:
                asked = (request.lora_name, str(path), request.lora_int_id)
                await self._prepare(engine, asked)
            added = await original(engine, request)
            if reason := await self._refusal_of_workers(engine, request, path.name):
                verdict = rejected(verdict, reason)
            taken = not refused(verdict)
        finally:
            # Also when the client has gone: what nobody registered must not stay under the id.
            if not taken:
                request.lora_path = origin
                self._desk.store.release(path)
                if not same:
                    await engine.remove_lora(request.lora_int_id)
        return added, verdict

    async def _decided(self, engine: Any, request: Any) -> tuple[Verdict, Path | None]:
        """The decision, and where the copy lies that workers may load, if they may."""
        policy = self._desk.policy
        try:
            folder = await self._folder(request)
            decision: tuple[Verdict, Path | None] = await self._in_thread(
                self._decide, folder, request.lora_name, compat.base_model(engine.vllm_config)
            )
        except AdapterRejected as error:
            reason = Reason.of(error)
            return rejected(unknown(request.lora_name, request.lora_path, policy), reason), None
        await self._tell_policy(engine)
        return decision

    def _decide(
        self, folder: Path, name: str, base_model: str | None
    ) -> tuple[Verdict, Path | None]:
        return self._desk.decide(folder, name, base_model, self._shapes or (), keep_refused=False)

    async def _folder(self, request: Any) -> Path:
        """Where the adapter lies, downloaded if its path is a hub id and the policy lets it be."""
        folder = compat.local_folder(request)
        limits = self._desk.policy.limits
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

    async def _know_model(self, engine: Any) -> None:
        """The shapes of the model's modules; metrics count by their layers and projections."""
        if self._shapes is None:
            ranks = await ask_workers(engine, "s3lora_model")
            places = {tuple(place) for rank in ranks for place in rank["places"]}
            self._desk.recorder.metrics.know_model(places)
            self._shapes = {(m, n) for rank in ranks for m, n in rank["shapes"]}
            self._told = self._desk.policy.digest

    async def _tell_policy(self, engine: Any) -> None:
        """Workers take up a changed policy when the registrar has."""
        if self._told != (digest := self._desk.policy.digest):
            self._told = digest
            await ask_workers(engine, "s3lora_refresh")

    async def _prepare(self, engine: Any, asked: tuple[str, str, int]) -> None:
        """Wait until every worker has read a copy (name, path, id), beside its steps."""
        while not all(await ask_workers(engine, "s3lora_prepared", asked)):
            await asyncio.sleep(POLL_SECONDS)

    async def _refusal_of_workers(self, engine: Any, request: Any, key: str) -> Reason | None:
        """Why a worker holds this adapter without effect, or holds another under its id."""
        answers = await ask_workers(engine, "s3lora_loaded", (request.lora_int_id,))
        if reason := next((Reason(*refusal) for _, refusal in answers if refusal), None):
            return reason
        if all(held == key for held, _ in answers):
            return None
        return Reason.of(GateFailed("the engine holds another adapter under this id"))

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
