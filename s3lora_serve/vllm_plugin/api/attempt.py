"""One registration or dry scan that is under way."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3lora_serve.vllm_plugin.admission_controller import Experiment
from s3lora_serve.vllm_plugin.model_modules import ModelModules

door: ContextVar[str] = ContextVar("door", default="engine")
"""The door (load route, resolver, static list) of the adapter that this task registers."""

experiment: ContextVar[Experiment | None] = ContextVar("experiment", default=None)
"""The settings of the experiment that this task registers, if it does."""


@dataclass(slots=True)
class Attempt:
    """An adapter that a client asks for."""

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
