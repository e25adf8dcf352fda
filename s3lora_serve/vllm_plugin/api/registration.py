"""One registration: who asks for an adapter, by which door, and what became of it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import Reason
from s3lora_serve.telemetry.audit_event import Requester
from s3lora_serve.vllm_plugin.admission_controller import Experiment
from s3lora_serve.vllm_plugin.api.client import asked_by
from s3lora_serve.vllm_plugin.model_modules import ModelModules

IN_PROCESS = ("static", "engine")
"""Doors at which the operator's own process asks."""

_current: ContextVar["Registration | None"] = ContextVar("registration", default=None)


@dataclass(slots=True)
class Registration:
    """An adapter that somebody asks the server to register, or to decide on as if."""

    door: str = "engine"  # load route, static list, resolver, experiment, dry scan
    tenant: str = ""
    experiment: Experiment | None = None  # its settings, if it has any of its own
    requester: Requester | None = field(default_factory=asked_by)  # None: nobody over HTTP
    verdict: Verdict | None = None  # once it is decided
    refusal: Reason | None = None  # why it came to nothing

    @property
    def asked_with(self) -> str | None:
        """The requester's key, "" without one; None: the operator's own process asks.

        Over HTTP somebody asks, also where no middleware notes who: owners' keys are checked.
        """
        if self.requester is not None:
            return self.requester.key or ""
        return None if self.door in IN_PROCESS else ""


@contextmanager
def registering(door: str, experiment: Experiment | None = None) -> Iterator[Registration]:
    """Within this context adapters arrive by a door; a context around it has the first word."""
    if (outer := _current.get()) is not None:
        yield outer
        return
    token = _current.set(Registration(door, experiment=experiment))
    try:
        yield current()
    finally:
        _current.reset(token)


def current() -> Registration:
    """The registration that this task serves; a new one if vLLM's own `add_lora` was called."""
    return _current.get() or Registration()


@dataclass(slots=True)
class Attempt:
    """A registration or dry scan that is under way."""

    registration: Registration
    engine: Any
    request: Any  # vLLM's LoRARequest
    original: Callable[..., Awaitable[bool]]  # vLLM's own add_lora
    modules: ModelModules
    downloaded: Path | None  # the folder, if the path is a hub id
    is_abandoned: bool = False  # True: the client left

    def check_wanted(self) -> None:
        """Check that the client still waits.

        Raises:
            CancelledError: it does not.
        """
        if self.is_abandoned:
            raise asyncio.CancelledError
