"""The client whose HTTP request a task serves, as far as the API server knows it."""

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


@dataclass(slots=True)
class Client:
    """The sender of one HTTP request; the tasks that the request starts share it."""

    requester: Requester
    has_own_key: bool = False  # the server has several keys, so that a key tells clients apart
    retry_seconds: int | None = None  # a 429 says so; None: the request is not turned away


client: ContextVar[Client | None] = ContextVar("client", default=None)
"""None outside of requests (static adapters)."""


def note_retry(seconds: int) -> None:
    """Have a 429 to the request that this task serves say when to come back."""
    if (asks := client.get()) is not None:
        asks.retry_seconds = seconds


def asked_by() -> Requester | None:
    """Who sent the request that this task serves; None: there is none."""
    return asks.requester if (asks := client.get()) is not None else None


class ClientNote:
    """ASGI middleware: sets `client` for each HTTP request, and adds Retry-After to a 429."""

    def __init__(self, app: App, keys: list[str]) -> None:
        """Wrap an app; `keys` are the server's API keys."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            key = given_key(scope, self._keys)
            address = scope.get("client")
            requester = Requester(key and _name(key), address[0] if address else None)
            client.set(asks := Client(requester, has_own_key=len(self._keys) > 1))
            send = partial(_send, send, asks)
        await self._app(scope, receive, send)


async def _send(send: Any, asks: Client, message: MutableMapping[str, Any]) -> None:
    seconds = asks.retry_seconds
    if message["type"] == "http.response.start" and message["status"] == 429 and seconds:
        header = (b"retry-after", str(seconds).encode())
        message = {**message, "headers": [*message.get("headers", ()), header]}
    await send(message)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:KEY_DIGITS]
