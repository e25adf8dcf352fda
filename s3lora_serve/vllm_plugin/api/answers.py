"""Answers of the gate's own routes that are no verdict."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request, responses

from s3lora_serve.errors import LoadPostponed, Reason, S3LoRAError
from s3lora_serve.vllm_plugin.api.client import note_retry

T = TypeVar("T")


class JSONResponse(responses.JSONResponse):
    """JSON in UTF-8; what UTF-8 cannot encode is escaped, where FastAPI's own would fail."""

    def render(self, content: Any) -> bytes:
        """The body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # \ud800 in JSON's own notation


def not_found(text: str) -> JSONResponse:
    """404, and in words what there is not."""
    return JSONResponse({"error": text}, 404)


class GateOff(Exception):
    """The mode is off, so nothing is registered or decided."""


def gate_off(_request: Request, _state: Exception) -> JSONResponse:
    """The answer to a request while the mode is off: 404."""
    return not_found("the gate is off: nothing is looked at")


def in_force(registration: Callable[[], T | None]) -> Callable[[], T]:
    """What gives this process's registration, or raises GateOff, which `gate_off` answers."""

    def given() -> T:
        if (found := registration()) is None:
            raise GateOff
        return found

    return given


def refused(error: S3LoRAError, status: int) -> JSONResponse:
    """A refusal with its code and message."""
    reason = Reason.of(error)
    return JSONResponse({"error": {"code": reason.code, "message": reason.message}}, status)


def turned_away(error: LoadPostponed) -> JSONResponse:
    """429 with Retry-After."""
    note_retry(error.retry_seconds)
    return refused(error, 429)
