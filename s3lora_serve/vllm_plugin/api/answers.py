"""Answers of the gate's own routes that are no verdict."""

from fastapi.responses import JSONResponse

from s3lora_serve.errors import LoadPostponed, Reason, S3LoRAError
from s3lora_serve.vllm_plugin.api.requester import note_retry


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
