"""Answers of the gate's own routes that are no verdict."""

import json
from typing import Any

from fastapi import responses

from s3lora_serve.errors import LoadPostponed, Reason, S3LoRAError
from s3lora_serve.vllm_plugin.api.requester import note_retry


class JSONResponse(responses.JSONResponse):
    """JSON in UTF-8; what UTF-8 cannot encode is escaped, where FastAPI's own would fail."""

    def render(self, content: Any) -> bytes:
        """The body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # \ud800 in JSON's own notation


def not_found(text: str) -> JSONResponse:
    """404, and in words what there is not."""
    return JSONResponse({"error": text}, 404)


def gate_off() -> JSONResponse:
    """404, because nothing is registered or decided."""
    return not_found("the gate is off: nothing is looked at")


def refused(error: S3LoRAError, status: int) -> JSONResponse:
    """A refusal with its code and message."""
    reason = Reason.of(error)
    return JSONResponse({"error": {"code": reason.code, "message": reason.message}}, status)


def turned_away(error: LoadPostponed) -> JSONResponse:
    """429 with Retry-After."""
    note_retry(error.retry_seconds)
    return refused(error, 429)
