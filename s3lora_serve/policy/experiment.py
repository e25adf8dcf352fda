"""What one experiment changes in the policy: only what the policy allows, and no limit."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from s3lora_serve.errors import ExperimentClosed, NameReserved
from s3lora_serve.policy.method import Action, Normalization, Strip
from s3lora_serve.policy.schema import Policy, parse_policy
from s3lora_serve.scorer_names import MAS_SVD, ServingScorer


class ScorerSettings(BaseModel):
    """The scorer of an experiment; its reference, if it needs one, is the policy's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ServingScorer = MAS_SVD
    rank: Annotated[int, Field(ge=1)] | None = None
    normalization: Normalization = "two_sided"


class RepairSettings(BaseModel):
    """The λ of an experiment's repair; the statistics are the policy's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    strength: Annotated[float, Field(gt=0, le=1e6)]


class ExperimentSettings(BaseModel):
    """The settings of one experiment; those left out are the policy's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    strip: Strip | None = None
    scorer: ScorerSettings | None = None
    action: Action | None = None
    repair: RepairSettings | Literal["off"] | None = None


def check_name(policy: Policy, name: str, *, is_experiment: bool) -> None:
    """Check that experiments, and nothing else, are registered under the names kept for them.

    Raises:
        ExperimentClosed: an experiment, and the policy allows none.
        NameReserved: a name for experiments that is asked for otherwise, or the reverse.
    """
    if policy.experiments is None:
        if is_experiment:
            raise ExperimentClosed("this server's policy has no experiments")
        return
    if policy.experiments.claims(name) != is_experiment:
        kept = f"{policy.experiments.names!r}, the names for experiments"
        raise NameReserved(f"{name!r} {'is not one of' if is_experiment else 'is one of'} {kept}")


def _repair(policy: Policy, wanted: RepairSettings | Literal["off"] | None) -> Any:
    """The policy's repair with what an experiment wants of it; None: nothing is repaired.

    Raises:
        ExperimentClosed: the policy names no statistics.
    """
    if wanted is None or wanted == "off":
        return None
    if policy.repair is None:
        raise ExperimentClosed("the policy has no repair, whose statistics an experiment needs")
    return policy.repair.model_dump(mode="json") | wanted.model_dump()


def check_open(policy: Policy, name: str, settings: ExperimentSettings, *, with_plan: bool) -> None:
    """Check that the policy allows an experiment of this name with these settings.

    Raises:
        ExperimentClosed, NameReserved, PolicyInvalid: as `check_name` and `experiment_policy`.
    """
    check_name(policy, name, is_experiment=True)
    experiment_policy(policy, settings, with_plan=with_plan)


def experiment_policy(policy: Policy, settings: ExperimentSettings, *, with_plan: bool) -> Policy:
    """The policy with an experiment's settings in the place of its own.

    `policy` is the one for this adapter, rules applied: rules must not undo the settings. Plans
    stay the policy's, unless it allows `plan`: then a plan that is given takes the place of the
    folder's, and without one the index chooses.

    Raises:
        ExperimentClosed: the policy does not allow one of the settings.
        PolicyInvalid: the settings do not suit each other.
    """
    changes: dict[str, Any] = settings.model_dump(exclude_none=True)
    used = {*changes, *(("plan",) if with_plan else ())}
    allowed = policy.experiments.allow if policy.experiments else frozenset[str]()
    if closed := sorted(used - allowed):
        raise ExperimentClosed(f"experiments.allow of the policy does not list {closed[0]}")
    if "strip" in changes and settings.strip:
        changes["strip"] = dict([settings.strip.rule])
    if "scorer" in changes:
        changes["scorer"] = policy.scorer.model_dump(mode="json") | changes["scorer"]
    if "repair" in changes:
        changes["repair"] = _repair(policy, settings.repair)
    if "plan" in allowed:
        changes |= {"plans": None, "require_plan": False}
    whole = policy.as_json() | {"rules": ()} | changes
    # A verdict was attested under the policy, not under these settings: the gate scores itself.
    whole["attestations"] |= {"trust_scores": False}
    if policy.attestations.policy_digest == "same":
        whole["attestations"] |= {"policy_digest": policy.deciding_digest}
    return parse_policy(whole, "the experiment")
