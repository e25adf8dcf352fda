"""What the gate's HTTP routes answer, for the server's OpenAPI document."""

from typing import Any

from pydantic import BaseModel, Field

from s3lora_serve.admission.verdict import Verdict


class Status(BaseModel):
    """Is every worker guarded?"""

    guarded: bool


class PolicyInForce(BaseModel):
    """The effective policy of this server."""

    digest: str = Field(description="sha256 of the effective policy as canonical JSON")
    policy: dict[str, Any]


class AdapterList(BaseModel):
    """Some of the adapters that are served."""

    adapters: list[dict[str, Any]] = Field(description="verdicts, modules without their spectrum")
    offset: int
    total: int = Field(description="adapters served")


class RecheckedExperiment(BaseModel):
    """The settings of an experiment."""

    settings: dict[str, Any]
    plan_digest: str | None = Field(description="of the plan that it was given")
    closed: bool = Field(description="whether the policy in force no longer allows it")


class Rechecked(BaseModel):
    """One served adapter under the policy in force now, an experiment with its settings."""

    name: str
    differs: bool = Field(description="whether it would be decided otherwise")
    experiment: RecheckedExperiment | None
    before: dict[str, Any] = Field(description="the verdict it was admitted with")
    after: dict[str, Any]


class Recheck(BaseModel):
    """Every served adapter under the policy in force now."""

    policy_digest: str
    policy_problem: str | None = Field(description="why the policy's file as it is was not taken")
    adapters: list[Rechecked]


class Experiments(BaseModel):
    """What experiments this server allows, and those that are registered."""

    names: str | None = Field(description="glob of the names kept for them; null: there are none")
    allow: list[str] = Field(description="settings that an experiment may have")
    ttl: float | None = Field(description="seconds after which one is ended; null: never")
    registered: list[str]


class Ended(BaseModel):
    """The experiment that was unloaded."""

    ended: str


class Problem(BaseModel):
    """What was wrong."""

    error: str | dict[str, Any] | None = Field(None, description="in words, or vLLM's error object")
    detail: str | None = Field(None, description="of requests that never reach a route")


Answers = dict[int | str, dict[str, Any]]

_WRONG = "no or a wrong API key, bad parameters, nothing of that name, or the gate is off"


def _answers(model: type) -> Answers:
    return {200: {"model": model}, "4XX": {"model": Problem, "description": _WRONG}}


STATUS: Answers = {
    200: {"model": Status},
    503: {"model": Status, "description": "a worker is not guarded, or does not answer"},
}
PAGE: Answers = {"4XX": {"description": _WRONG, "content": {"application/json": {}}}}
POLICY = _answers(PolicyInForce)
ADAPTERS = _answers(AdapterList)
VERDICT = _answers(Verdict)
RECHECK = _answers(Recheck)
EXPERIMENTS = _answers(Experiments)
ENDED = _answers(Ended)
LOADED = _answers(Problem) | {
    200: {
        "description": "vLLM's text of success; the decision is in X-S3LoRA-Decision",
        "content": {"text/plain": {}},
    }
}
"""A refusal is a 400 with `error.type` AdapterRejected and the S3LORA code in `error.message`."""
