"""HTTP routes that register adapters as experiments, with settings of their own."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Body, Request

from s3lora_serve.errors import ExperimentClosed, S3LoRAError
from s3lora_serve.plans.schema import parse_plan
from s3lora_serve.policy.experiment import ExperimentSettings, check_open
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.schema import Policy
from s3lora_serve.telemetry.events import EXPERIMENT
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.admission_controller import Experiment
from s3lora_serve.vllm_plugin.api.adapter_registrations import AdapterRegistrations
from s3lora_serve.vllm_plugin.api.answers import JSONResponse, not_found, refused
from s3lora_serve.vllm_plugin.api.experiment_ends import ExperimentEnds
from s3lora_serve.vllm_plugin.api.registration import registering
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter


class ExperimentRoutes:
    """`/s3lora/experiments`: what may be set, registration, and its end."""

    def __init__(self, in_force: Callable[[], AdapterRegistrations]) -> None:
        self._in_force = in_force
        self._ends = ExperimentEnds()

    async def show(self) -> JSONResponse:
        """The names kept for experiments, what they may set, and those that are registered."""
        registrations = self._in_force()
        kept = registrations.reload_policy().experiments
        served = [one.verdict.name for one in registrations.served.all() if one.experiment]
        return JSONResponse(
            {
                "names": kept.names if kept else None,
                "allow": sorted(kept.allow) if kept else [],
                "ttl": kept.ttl if kept else None,
                "registered": served,
            }
        )

    async def register(
        self,
        raw_request: Request,
        lora_name: Annotated[str, Body(min_length=1)],
        lora_path: Annotated[str, Body(min_length=1)],
        settings: Annotated[ExperimentSettings | None, Body()] = None,
        plan: Annotated[dict[str, Any] | None, Body()] = None,
    ) -> JSONResponse:
        """Register an adapter with settings of its own, and answer with its verdict.

        ExperimentSettings that are left out are the policy's. Without a plan the index chooses.
        """
        registrations = self._in_force()
        wanted = settings or ExperimentSettings()
        try:
            check_lengths(lora_name, lora_path)
            policy = registrations.reload_policy()
            check_open(policy, lora_name, wanted, with_plan=plan is not None)
            parsed = None if plan is None else parse_plan(plan, "the experiment's plan")
        except ExperimentClosed as closed:
            return refused(closed, 403)
        except S3LoRAError as error:
            return refused(error, 400)
        load = compat.load_request_model()(lora_name=lora_name, lora_path=lora_path)
        models = compat.served_models(raw_request)
        try:
            with registering(EXPERIMENT, Experiment(wanted, parsed)) as registration:
                result = await models.load_lora_adapter(load)
        finally:
            self._ends.watch(registrations, models)
        if not isinstance(result, str):
            return JSONResponse(result.model_dump(), result.error.code)
        verdict = registration.verdict
        return JSONResponse(verdict.as_json(spectra=False) if verdict else {})

    async def end(self, raw_request: Request, name: str) -> JSONResponse:
        """Unload an experiment; adapters that are none are left alone."""
        registrations = self._in_force()
        found = registrations.served.get(name)
        if found is None or found.experiment is None:
            return not_found(f"no experiment {name!r} is registered")
        unload = compat.unload_request_model()(lora_name=name)
        result = await compat.served_models(raw_request).unload_lora_adapter(unload)
        if not isinstance(result, str):
            return JSONResponse(result.model_dump(), result.error.code)
        return JSONResponse({"ended": name})


def described(one: ServedAdapter, policy: Policy) -> dict[str, Any] | None:
    """What an experiment sets, and whether this policy closes it; None: it is no experiment."""
    if (own := one.experiment) is None:
        return None
    try:
        check_open(policy, one.verdict.name, own.settings, with_plan=own.plan is not None)
        closed = False
    except S3LoRAError:
        closed = True
    return {
        "settings": own.settings.model_dump(mode="json", exclude_none=True),
        "plan_digest": own.plan and own.plan.digest,
        "closed": closed,
    }
