"""From a stored copy to an adapter in every worker of the engine, or to nothing at all."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected, GateFailed, Reason
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import AdmissionController
from s3lora_serve.vllm_plugin.api.preload_reports import reported
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter
from s3lora_serve.vllm_plugin.api.worker_calls import call_workers, while_alive

FIRST_REPLACEMENT_ID = 2**30
"""Ids from here on are for replaced adapters. vLLM counts its own from 1, in 32 bits."""


class EngineLoad:
    """Has the engine load stored copies. Every step has a deadline or is one call to the engine."""

    def __init__(self, controller: AdmissionController) -> None:
        self._controller = controller
        self._ids = count(FIRST_REPLACEMENT_ID)
        # Two adapters in one step of the engine would delay its tokens by both.
        self._turn = asyncio.Lock()

    def choose_id(self, request: Any, path: Path, before: ServedAdapter | None) -> bool:
        """Give a request its path and id; whether the engine has this adapter already.

        An adapter that replaces other content gets a new id: running requests finish with the
        adapter they began with.
        """
        unchanged = bool(request.load_inplace and before is not None and before.path == path)
        if request.load_inplace:
            same_id = before.adapter_id if before is not None and unchanged else None
            request.lora_int_id = same_id or next(self._ids)
        request.lora_path = str(path)
        # Loaded once: with load_inplace vLLM would read and activate it again at every step.
        request.load_inplace = False
        return unchanged

    async def load(
        self,
        engine: Any,
        request: Any,
        original: Callable[..., Awaitable[bool]],
        *,
        origin: str,
        unchanged: bool,
    ) -> tuple[bool, Reason | None]:
        """Load the copy that a request names; vLLM's answer, and why a worker does not serve it.

        Workers read it beside the engine's steps first, so that other tenants' tokens do not wait.
        `origin` is the path that the adapter is registered with, which the workers' logs show.
        """
        path = Path(request.lora_path)
        copy = request.lora_name, request.lora_path, request.lora_int_id
        async with self._turn:
            try:
                if unchanged:
                    await call_workers(engine, "s3lora_registered", (*copy, origin))
                else:
                    await self._preload(engine, copy, origin)
                added = await while_alive(engine, original(engine, request))
            except AdapterRejected as refusal:
                return False, Reason.of(refusal)
            return added, await self._refusal(engine, request, path.name)

    async def drop(self, engine: Any, adapter_id: int, path: Path, *, unchanged: bool) -> None:
        """Undo a load: unpin the copy, and leave nothing of it in any worker."""
        self._controller.store.unpin(path)
        if not unchanged:
            await call_workers(engine, "s3lora_forget", (str(path), adapter_id))
            await while_alive(engine, engine.remove_lora(adapter_id))

    async def trial(self, engine: Any, name: str, path: Path) -> Reason | None:
        """Why a worker would not serve a stored copy; it is read there, and not added."""
        copy = (name, str(path), next(self._ids))
        try:
            await self._preload(engine, copy)
            answers = await call_workers(engine, "s3lora_trial", copy)
        except AdapterRejected as refusal:
            return Reason.of(refusal)
        finally:
            await call_workers(engine, "s3lora_forget", copy[1:])
        return next((Reason(*answer) for answer in answers if answer), None)

    async def _preload(
        self, engine: Any, copy: tuple[str, str, int], origin: str | None = None
    ) -> None:
        """Wait until every worker has read a stored copy (name, path, id).

        One call does all, as each call delays a step of the engine: with `origin`, the workers note
        the path that the adapter is registered with.

        Raises:
            DeadlinePassed: one did not within limits.load_seconds.
            GateFailed: the engine ended before.
        """
        folder = self._controller.store.process_folder()
        arguments = (*copy, origin, str(folder), compat.has_requests(engine))
        names = await call_workers(engine, "s3lora_preload", arguments)
        seconds = self._controller.policy.limits.load_seconds
        await while_alive(engine, reported(folder, names, seconds))

    async def _refusal(self, engine: Any, request: Any, key: str) -> Reason | None:
        """Why a worker loaded the adapter without effect, or holds another one under its id."""
        copy = (request.lora_path, request.lora_int_id)
        answers = await call_workers(engine, "s3lora_loaded", copy)
        if reason := next((Reason(*refusal) for _, refusal in answers if refusal), None):
            return reason
        if all(loaded == key for loaded, _ in answers):
            return None
        return Reason.of(GateFailed("the engine holds another adapter under this id"))
