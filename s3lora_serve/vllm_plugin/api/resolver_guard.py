"""What vLLM's resolvers may open, checked before they open it.

A resolver finds an adapter by the model name of an inference request, so the client chooses what
is looked up. What it finds is then admitted as at every door.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.folder_below import check_name, config_below
from s3lora_serve.errors import DeadlinePassed
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess

MAX_LOOKUPS = 2
"""Lookups at the same time, in a pool of their own: storage that hangs holds up only this door."""


class ResolverGuard:
    """Guards the resolvers of one API server."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, "s3lora-resolver")
        self._warned: str | None = None  # digest of the policy that the log was warned about

    def check_name(self, models: Any, name: str) -> None:
        """Check the model name of a request before a resolver sees it.

        Raises:
            OutsideRoots, TooLong: see `check_name` in adapter/folder_below.py.
        """
        if compat.has_resolvers(models):
            check_name(name)

    async def find(self, resolver: Any, name: str, path: str, base_model: str) -> Any:
        """The request for the adapter at this path, None if there is none for the base model.

        Replaces vLLM's own, which opens the configuration whatever it is, and waits.

        Raises:
            AdapterRejected: see `config_below`.
            DeadlinePassed: it took longer than limits.seconds.
        """
        folder = Path(path).absolute()
        parent = compat.resolver_folder(resolver)
        config = await self._in_thread(config_below, parent, folder, name)
        if config is None or config.get("peft_type") != "LORA":
            return None
        if config.get("base_model_name_or_path") != base_model:
            return None
        return compat.request_for(name, str(folder), 1)  # vLLM gives it an id of its own

    async def ask_hub(
        self, resolver: Any, base_model: str, name: str, original: Callable[..., Awaitable[Any]]
    ) -> Any:
        """What the hub resolver finds; it is not asked while the policy has limits.roots."""
        policy = await self._in_thread(self._process.reload_policy)
        if not policy.limits.roots:
            return await original(resolver, base_model, name)
        if self._warned != policy.digest:
            self._warned = policy.digest
            compat.logger.warning(
                "s3lora: the hub resolver is not asked: the policy has limits.roots"
            )
        return None

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        seconds = self._process.policy.limits.seconds
        done = asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        try:
            return await asyncio.wait_for(done, seconds)
        except TimeoutError:
            raise DeadlinePassed(f"looking up took over {seconds:g} s (limits.seconds)") from None
