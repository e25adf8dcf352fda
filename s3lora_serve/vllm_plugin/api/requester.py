"""Who sent the HTTP request that this task serves, as far as the API server knows."""

import hashlib
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from s3lora_serve.vllm_plugin.api.api_key import given_key

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

KEY_DIGITS = 16
"""Hexadecimal digits of a key's sha256 that name the key: enough to tell keys apart, and too few to
confirm a guess of a weak key beyond doubt."""


@dataclass(frozen=True, slots=True)
class Requester:
    """One client of the API server."""

    key: str | None  # the start of the sha256 of its API key; None: the server has no keys
    address: str | None  # its network address, or that of a proxy in front of the server


requester: ContextVar[Requester | None] = ContextVar("requester", default=None)
"""The client whose request this task serves; None outside of requests (static adapters)."""


def asked_with() -> str | None:
    """The key of the client whose request this task serves, "" without one; None: no request."""
    client = requester.get()
    return None if client is None else client.key or ""


class RequesterNote:
    """ASGI middleware: sets `requester` for each HTTP request."""

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
        await self._app(scope, receive, send)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:KEY_DIGITS]
