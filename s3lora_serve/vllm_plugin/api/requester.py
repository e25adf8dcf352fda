"""Who sent the HTTP request that this task serves, as far as the API server knows."""

import hashlib
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3lora_serve.telemetry.audit_event import Requester
from s3lora_serve.vllm_plugin.api.api_key import given_key

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

KEY_DIGITS = 16
"""Hexadecimal digits of a key's sha256 that name the key: enough to tell keys apart, and too few to
confirm a guess of a weak key beyond doubt."""


requester: ContextVar[Requester | None] = ContextVar("requester", default=None)
"""The client whose request this task serves; None outside of requests (static adapters)."""

keys_tell_apart: ContextVar[bool] = ContextVar("keys_tell_apart", default=False)
"""Whether the server has several API keys, so that a key tells clients apart."""


@dataclass(slots=True)
class RetryAfter:
    """When a request that is turned away may be sent again, in seconds; None: it is not."""

    seconds: int | None = None


retry_after: ContextVar[RetryAfter | None] = ContextVar("retry_after", default=None)
"""For the answer to the request that this task serves; shared with the tasks that it starts."""


def note_retry(seconds: int) -> None:
    """Have a 429 to the request that this task serves say when to come back."""
    if (again := retry_after.get()) is not None:
        again.seconds = seconds


def asked_with() -> str | None:
    """The key of the client whose request this task serves, "" without one; None: no request."""
    client = requester.get()
    return None if client is None else client.key or ""


class RequesterNote:
    """ASGI middleware: sets `requester` for each HTTP request, and adds Retry-After to a 429."""

    def __init__(self, app: App, keys: list[str]) -> None:
        """Wrap an app; `keys` are the server's API keys."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            key = given_key(scope, self._keys)
            client = scope.get("client")
            requester.set(Requester(key and _name(key), client[0] if client else None))
            keys_tell_apart.set(len(self._keys) > 1)
            retry_after.set(again := RetryAfter())
            send = partial(_send, send, again)
        await self._app(scope, receive, send)


async def _send(send: Any, again: RetryAfter, message: MutableMapping[str, Any]) -> None:
    if message["type"] == "http.response.start" and message["status"] == 429 and again.seconds:
        header = (b"retry-after", str(again.seconds).encode())
        message = {**message, "headers": [*message.get("headers", ()), header]}
    await send(message)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:KEY_DIGITS]
