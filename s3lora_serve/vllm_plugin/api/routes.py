"""HTTP routes in vLLM's API server: status, served adapters, policy, scan, load."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, Response

from s3lora_serve.admission.verdict import Decision, Verdict, differs
from s3lora_serve.errors import LoadPostponed, TooLong
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.schema import Policy
from s3lora_serve.store.stored_spectra import with_spectra
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.api import openapi
from s3lora_serve.vllm_plugin.api.adapter_registrations import AdapterRegistrations
from s3lora_serve.vllm_plugin.api.answers import (
    GateOff,
    JSONResponse,
    gate_off,
    in_force,
    not_found,
    refused,
    turned_away,
)
from s3lora_serve.vllm_plugin.api.api_key import ApiKeyGate
from s3lora_serve.vllm_plugin.api.client import ClientNote
from s3lora_serve.vllm_plugin.api.experiments import ExperimentRoutes, described
from s3lora_serve.vllm_plugin.api.html_page import one_adapter, overview
from s3lora_serve.vllm_plugin.api.registration import Registration, registering
from s3lora_serve.vllm_plugin.api.rendering import Rendering, dumps, verdict_json
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter
from s3lora_serve.vllm_plugin.api.worker_calls import call_workers

DECISION_HEADER = "X-S3LoRA-Decision"
PAGE = 100
"""Default number of adapters in one answer; a verdict without spectra has about 50 KB."""


class GateRoutes:
    """vLLM's EndpointPlugin protocol."""

    name = "s3lora"
    required_tasks = None

    def __init__(self, registrations: Callable[[], AdapterRegistrations | None]) -> None:
        """Take what returns the registrations of this process, None while the mode is off."""
        self._registrations = registrations
        self._in_force = in_force(registrations)
        self._engine: Any | None = None
        self._rendering = Rendering()

    def attach_router(self, app: FastAPI) -> None:
        """Add the gate's routes; those that read folders only if run-time loading is enabled."""
        if (registrations := self._registrations()) is not None:
            registrations.warm_up()
        app.add_exception_handler(GateOff, gate_off)
        keys = compat.api_keys(app.state.args)
        app.add_middleware(ApiKeyGate, keys=keys)
        app.add_middleware(ClientNote, keys=keys)
        html = {"response_class": HTMLResponse}
        _add(app, "GET", "/s3lora/status", self.status, openapi.STATUS)
        _add(app, "GET", "/s3lora/", self.page, openapi.PAGE, **html)
        _add(app, "GET", "/s3lora/policy", self.policy, openapi.POLICY)
        _add(app, "GET", "/s3lora/adapters", self.adapters, openapi.ADAPTERS)
        _add(app, "GET", "/s3lora/adapters/{name:path}", self.adapter, openapi.VERDICT)
        _add(app, "POST", "/s3lora/recheck", self.recheck, openapi.RECHECK)
        if compat.runtime_loading_open():
            json_only = {"dependencies": compat.json_only()}
            _add(app, "POST", "/s3lora/scan", self.scan, openapi.VERDICT, **json_only)
            experiments = ExperimentRoutes(self._in_force)
            path = "/s3lora/experiments"
            _add(app, "GET", path, experiments.show, openapi.EXPERIMENTS)
            _add(app, "POST", path, experiments.register, openapi.VERDICT, **json_only)
            _add(app, "DELETE", f"{path}/{{name:path}}", experiments.end, openapi.ENDED)
            load = "/v1/load_lora_adapter"
            compat.drop_route(app, load, "POST")
            _add(app, "POST", load, self._load_route(), openapi.LOADED, **json_only)

    async def init_state(
        self,
        engine_client: Any | None,
        state: Any,  # noqa: ARG002 - vLLM's protocol
        args: Any,  # noqa: ARG002
    ) -> None:
        """Keep the engine client, by which workers are called."""
        self._engine = engine_client

    async def status(self) -> JSONResponse:
        """200 if every worker is guarded, else 503. Needs no key, and says nothing else."""
        guarded = False
        if self._engine is not None:
            try:
                answers = await call_workers(self._engine, "s3lora_status")
                guarded = bool(answers) and all(answer["active"] for answer in answers)
            except Exception:  # noqa: BLE001 - a dead or unguarded engine is not guarded, whatever the error
                guarded = False
        return JSONResponse({"guarded": guarded}, status_code=200 if guarded else 503)

    async def page(
        self,
        adapter: Annotated[str | None, Query(max_length=4096)] = None,
        module: Annotated[str | None, Query(max_length=4096)] = None,
        q: Annotated[str, Query(max_length=256)] = "",
        page: Annotated[int, Query(ge=1)] = 1,
    ) -> Response:
        """For people: the adapters, or one adapter with its heat map and a module's spectrum."""
        registrations = self._in_force()
        served = registrations.served
        if adapter is None:
            refused = registrations.reports.recent.refusals()
            shown = registrations.policy, served, served.all(), refused, q, page
            return await self._rendering.run(overview, *shown)
        found = served.get(adapter)
        if found is None:
            return not_found(f"no adapter {adapter!r} is served")
        return await self._rendering.run(one_adapter, served, found, module)

    async def policy(self) -> JSONResponse:
        """The policy in force, and its digest."""
        registrations = self._in_force()
        policy = registrations.policy
        return JSONResponse({"digest": policy.digest, "policy": policy.as_json()})

    async def adapters(
        self,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = PAGE,
        modules: Annotated[bool, Query()] = True,
    ) -> Response:
        """Verdicts on the served adapters in the order of registration, without spectra.

        `modules=false` leaves the modules out: what is left of a verdict has about 1 KB.
        """
        registrations = self._in_force()
        served = registrations.served.all()
        page = [one.verdict for one in served[offset : offset + limit]]
        if not modules:
            page = [replace(verdict, modules=()) for verdict in page]
        fields = {"offset": offset, "total": len(served)}
        return self._rendering.stream(fields, partial(verdict_json, spectra=False), page)

    async def adapter(self, name: str) -> Response:
        """The whole verdict on one served adapter; names may contain slashes."""
        registrations = self._in_force()
        found = registrations.served.get(name)
        if found is None:
            return not_found(f"no adapter {name!r} is served")
        return await self._rendering.json(_whole_verdict, found)

    async def recheck(self) -> Response:
        """Which served adapters would be decided otherwise under the policy in force now."""
        registrations = self._in_force()
        await self._rendering.run(registrations.reload_policy)
        try:
            pairs = await registrations.recheck(self._engine)
        except LoadPostponed as postponed:
            return turned_away(postponed)
        policy = registrations.policy
        known = {"policy_digest": policy.digest, "policy_problem": registrations.policy_problem}
        return self._rendering.stream(known, partial(_rechecked, policy), pairs)

    async def scan(
        self,
        lora_name: Annotated[str, Body(min_length=1)],
        lora_path: Annotated[str, Body(min_length=1)],
    ) -> Response:
        """The verdict that a registration would get, workers included; nothing is registered."""
        registrations = self._in_force()
        try:
            check_lengths(lora_name, lora_path)
            verdict = await registrations.dry_run(self._engine, lora_name, lora_path)
        except compat.LoRAAdapterNotFoundError as error:
            return not_found(str(error))
        except TooLong as error:
            return refused(error, 400)
        except LoadPostponed as postponed:
            return turned_away(postponed)
        return await self._rendering.json(verdict_json, verdict)

    def _load_route(self) -> Any:
        request_model = compat.load_request_model()

        async def load_lora_adapter(request: request_model, raw_request: Request) -> Response:  # type: ignore[valid-type]
            """vLLM's own, through the gate: X-S3LoRA-Decision, and 400 AdapterRejected."""
            with registering("http") as registration:
                result = await compat.served_models(raw_request).load_lora_adapter(request)
            if isinstance(result, str):
                return Response(result, headers=_decision(registration))
            return JSONResponse(result.model_dump(), result.error.code, _decision(registration))

        return load_lora_adapter


def _add(
    app: FastAPI, method: str, path: str, handler: Any, answers: openapi.Answers, **more: Any
) -> None:
    app.add_api_route(path, handler, methods=[method], responses=answers, tags=["s3lora"], **more)


def _whole_verdict(adapter: ServedAdapter) -> str:
    return verdict_json(with_spectra(adapter.verdict, adapter.path))


def _rechecked(policy: Policy, found: tuple[ServedAdapter, Verdict]) -> str:
    one, after = found
    fields = dumps(
        {
            "name": one.name,
            "differs": differs(one.verdict, after),
            "experiment": described(one, policy),
        }
    )
    texts = (verdict_json(verdict, spectra=False) for verdict in (one.verdict, after))
    return '{},"before":{},"after":{}}}'.format(fields[:-1], *texts)


def _decision(registration: Registration) -> dict[str, str] | None:
    """The header of a load's answer. Nothing was decided on one that is to be tried again."""
    decided = registration.verdict.decision if registration.verdict else None
    if registration.refusal is not None:
        decided = None if registration.refusal.is_postponed else Decision.REJECTED
    return {DECISION_HEADER: decided.value} if decided else None
