"""From a stored copy to an adapter in every worker of the engine, or to nothing at all."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected, GateFailed, Reason
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.api.preload_reports import reported
from s3lora_serve.vllm_plugin.api.worker_calls import call_workers, while_alive
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopy
from s3lora_serve.vllm_plugin.replacement_ids import ReplacementIds


class EngineLoad:
    """Has the engine load stored copies. Every step has a deadline or is one call to the engine."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self._ids = ReplacementIds()
        # Two adapters in one step of the engine would delay its tokens by both.
        self._turn = asyncio.Lock()

    def choose_id(self, request: Any, path: Path, before: PinnedCopy | None) -> bool:
        """Give a request its path and id; whether the engine has this adapter already."""
        unchanged = bool(request.load_inplace and before is not None and before.path == path)
        if request.load_inplace:
            request.lora_int_id = self._ids.of(path, before)
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
        stored = request.lora_name, request.lora_path, request.lora_int_id
        async with self._turn:
            try:
                if unchanged:
                    await call_workers(engine, "s3lora_registered", (*stored, origin))
                else:
                    await self._preload(engine, stored, origin)
                added = await while_alive(engine, original(engine, request))
            except AdapterRejected as refusal:
                with suppress(AdapterRejected):  # the engine has ended
                    await self._refusal(engine, request, path.name)  # the registration has ended
                return False, Reason.of(refusal)
            return added, await self._refusal(engine, request, path.name)

    def unpin(self, path: Path) -> None:
        """Let go of a stored copy that is not to be loaded."""
        self._process.store.unpin(path)

    async def drop(self, engine: Any, copy: PinnedCopy, *, unchanged: bool) -> None:
        """Undo a load: unpin the copy, and leave nothing of it in any worker."""
        self.unpin(copy.path)
        if not unchanged:
            await call_workers(engine, "s3lora_forget", (str(copy.path), copy.adapter_id))
            await while_alive(engine, engine.remove_lora(copy.adapter_id))

    async def trial(self, engine: Any, name: str, path: Path) -> Reason | None:
        """Why a worker would not serve a stored copy; it is read there, and not added."""
        stored = (name, str(path), self._ids.new())
        try:
            await self._preload(engine, stored)
            answers = await call_workers(engine, "s3lora_trial", stored)
        except AdapterRejected as refusal:
            return Reason.of(refusal)
        finally:
            await call_workers(engine, "s3lora_forget", stored[1:])
        return next((Reason(*answer) for answer in answers if answer), None)

    async def _preload(
        self, engine: Any, stored: tuple[str, str, int], origin: str | None = None
    ) -> None:
        """Wait until every worker has read a stored copy (name, path, id).

        One call does all, as each call delays a step of the engine: with `origin`, the workers note
        the path that the adapter is registered with.

        Raises:
            DeadlinePassed: one did not within limits.load_seconds.
            GateFailed: the engine ended before.
        """
        folder = self._process.store.process_folder()
        arguments = (*stored, origin, str(folder), compat.has_requests(engine))
        names = await call_workers(engine, "s3lora_preload", arguments)
        seconds = self._process.policy.limits.load_seconds
        await while_alive(engine, reported(folder, names, seconds))

    async def _refusal(self, engine: Any, request: Any, key: str) -> Reason | None:
        """Why a worker loaded the adapter without effect, or holds another one under its id."""
        stored = (request.lora_path, request.lora_int_id)
        answers = await call_workers(engine, "s3lora_loaded", stored)
        if reason := next((Reason(*refusal) for _, refusal in answers if refusal), None):
            return reason
        if all(loaded == key for loaded, _ in answers):
            return None
        return Reason.of(GateFailed("the engine holds another adapter under this id"))
