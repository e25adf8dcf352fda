"""The API key check for routes that vLLM's own check does not cover."""

import base64
import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

OPEN = ("/s3lora/status",)
"""Routes without a check: the status is one boolean, for probes."""


class ApiKeyGate:
    """ASGI middleware: `/adapters…` and `/s3lora/…` require the key whenever one is set.

    vLLM checks its own prefixes; `/adapters`, which loads and unloads, is not one of them. For
    `/s3lora/…` a browser may send the key as the password of Basic authentication.
    """

    def __init__(self, app: App, keys: list[str]) -> None:
        """Wrap an app; without `keys` no request is checked."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and not self._may_pass(scope):
            response = JSONResponse(
                {"error": "Unauthorized"}, 401, {"WWW-Authenticate": _challenge(scope)}
            )
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = _path(scope)
        ours = _under(path, "/s3lora")
        if path in OPEN or not (ours or _under(path, "/adapters")):
            return True
        return not self._keys or given_key(scope, self._keys, basic=ours) is not None


def given_key(scope: Scope, keys: list[str], *, basic: bool = True) -> str | None:
    """The one of `keys` that a request carries; None if it carries none of them."""
    given = _token(scope, basic=basic)
    return next((key for key in keys if _same(given, key)), None)


def _path(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def _under(path: str, prefix: str) -> bool:
    """Whether the router would match: its patterns end in `$`, which a trailing newline matches."""
    return re.match(rf"{prefix}(?![^/\s])", path) is not None


def _token(scope: Scope, *, basic: bool) -> str:
    scheme, _, value = Headers(scope=scope).get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # not base64, not ASCII, not UTF-8
            return ""
    return ""


def _same(given: str, key: str) -> bool:
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, key))
    return secrets.compare_digest(*digests)


def _challenge(scope: Scope) -> str:
    return 'Basic realm="s3lora"' if _under(_path(scope), "/s3lora") else "Bearer"
