"""HTTP routes inside vLLM's API server: refusals as 400, and whether the gate is up."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.api_key import ApiKeyGate
from s3lora_serve.vllm_plugin.hook import registrar

DECISION_HEADER = "X-S3LoRA-Decision"


class GateEndpoint:
    """vLLM's EndpointPlugin protocol."""

    name = "s3lora"
    required_tasks = None

    def __init__(self) -> None:
        self._engine: Any | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the gate's routes; the load route only where vLLM itself has it open."""
        app.add_middleware(ApiKeyGate, keys=compat.api_keys(app.state.args))
        app.add_api_route("/s3lora/status", self.status, methods=["GET"])
        if compat.runtime_loading_open():
            compat.drop_route(app, "/v1/load_lora_adapter", "POST")
            app.add_api_route(
                "/v1/load_lora_adapter",
                self._load_route(),
                methods=["POST"],
                dependencies=compat.json_only(),
            )

    async def init_state(
        self,
        engine_client: Any | None,
        state: Any,  # noqa: ARG002 - vLLM's protocol
        args: Any,  # noqa: ARG002
    ) -> None:
        """Keep the way to the workers."""
        self._engine = engine_client

    async def status(self) -> JSONResponse:
        """200 if every worker is guarded, else 503. Open, and says nothing else."""
        guarded = False
        if self._engine is not None:
            try:
                answers = await self._engine.collective_rpc("s3lora_status")
                guarded = bool(answers) and all(answer["active"] for answer in answers)
            except Exception:  # noqa: BLE001 - a dead or unguarded engine answers nothing usable: not guarded
                guarded = False
        return JSONResponse({"guarded": guarded}, status_code=200 if guarded else 503)

    def _load_route(self) -> Any:
        request_model = compat.load_request_model()

        async def load_lora_adapter(request: request_model, raw_request: Request) -> Response:  # type: ignore[valid-type]
            result = await compat.served_models(raw_request).load_lora_adapter(request)
            if isinstance(result, str):
                return Response(result, headers=_decision(request.lora_name))  # type: ignore[attr-defined]
            error = result.error
            ours = error.type == "AdapterRejected"
            return JSONResponse(
                result.model_dump(), error.code, {DECISION_HEADER: "rejected"} if ours else None
            )

        return load_lora_adapter


def _decision(name: str) -> dict[str, str] | None:
    desk = registrar()
    decision = desk.decision(name) if desk else None
    return {DECISION_HEADER: decision} if decision else None
