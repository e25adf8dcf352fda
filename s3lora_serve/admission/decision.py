"""Compute the admission decision from scores and a policy. Pure: no files, no vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from s3lora_serve.admission.strip_rules import (
    max_stripped_count,
    negligible_modules,
    select,
    strip_rule,
)
from s3lora_serve.admission.verdict import Decision
from s3lora_serve.errors import (
    AdapterRejected,
    Denied,
    NegativeAlpha,
    NoEffect,
    OverLimit,
    PlanMissing,
    TooManySharp,
    Uninformative,
    Unrankable,
)
from s3lora_serve.policy.schema import Policy

if TYPE_CHECKING:  # the command line starts without torch
    from s3lora_serve.plans.schema import Plan
    from s3lora_serve.spectral import ModuleScore

UNINFORMATIVE_SPREAD = 1e-3
"""Spread of relative SSI below which the index does not rank. Source: spec of MAS-SVD, facts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The decision on one adapter; `stripped`, `transformed`, `projected` hold module names."""

    decision: Decision
    refusal: AdapterRejected | None = None
    stripped: frozenset[str] = frozenset()
    uninformative: bool = False
    transformed: Mapping[str, float] = field(default_factory=dict)  # share of ‖ΔW‖_F² removed
    projected: Mapping[str, float] = field(default_factory=dict)  # the same; < 0 if ΔW grows
    repairs: bool = False  # the modules that are not stripped are to be repaired


def decide(
    scores: Sequence["ModuleScore"],
    scaling: Mapping[str, float],
    digest: str,
    policy: Policy,
    plan: "Plan | None" = None,
    config_digest: str | None = None,
) -> Outcome:
    """Decide on one adapter from the scores of its selected modules.

    Args:
        scores: finite scores, one for each selected module.
        scaling: the scaling of every module of the adapter, by name.
        digest: sha256 of the weights file, as the policy's deny and allow lists name it.
        policy: the policy for this adapter, rules applied.
        plan: the adapter's plan, which chooses in the place of the index.
        config_digest: sha256 of the configuration, which the allow list names beside the weights.
            None: no entry of the list is this adapter's.
    """
    if settled := settle(scores, scaling, digest, policy, config_digest):
        return settled
    if plan is not None:
        return _planned(plan, scores, policy)
    if policy.require_plan:
        return _rejected(PlanMissing(f"there is no plan for {digest} in {policy.plans}"))
    outcome = _chosen_by_index(scores, policy)
    repairs = policy.repair is not None and outcome.decision is not Decision.REJECTED
    return replace(outcome, repairs=repairs)


def settle(
    scores: Sequence["ModuleScore"],
    scaling: Mapping[str, float],
    digest: str,
    policy: Policy,
    config_digest: str | None = None,
) -> Outcome | None:
    """What deny, limits and allow decide, with or without a plan; None: plan or index decide."""
    if digest in policy.deny:
        return _rejected(Denied(f"the adapter {digest} is on the policy's deny list"))
    if excess := _over_limit(scores, scaling, policy):
        return _rejected(excess)
    if (digest, config_digest) in {(each.digest, each.config_digest) for each in policy.allow}:
        return Outcome(Decision.ADMITTED)
    negative = next((name for name, value in scaling.items() if value < 0), None)
    if negative is not None and not policy.limits.negative_alpha:
        found = f"module {negative} has scaling {scaling[negative]:g}"
        return _rejected(NegativeAlpha(f"{found}: its alpha is negative"))
    return None


def _planned(plan: "Plan", scores: Sequence["ModuleScore"], policy: Policy) -> Outcome:
    """What the plan says. What the index says of the adapter does not refuse it.

    A plan that keeps every module whole chooses nothing. Its probes found no harm, and prompts of
    other kinds may: repair acts on the adapter as it does without a plan.
    """
    transformed = {m.name: m.removed for m in plan.modules if m.action == "transform"}
    negligible = negligible_modules(scores, policy.negligible)
    obstacle = _ranking_obstacle([score for score in scores if score.name not in negligible])
    changes = bool(plan.stripped or transformed)
    return Outcome(
        Decision.STRIPPED if changes else Decision.ADMITTED,
        stripped=plan.stripped,
        uninformative=isinstance(obstacle, Uninformative),
        transformed=transformed,
        repairs=policy.repair is not None and not changes,
    )


def _chosen_by_index(scores: Sequence["ModuleScore"], policy: Policy) -> Outcome:
    negligible = negligible_modules(scores, policy.negligible)
    significant = [score for score in scores if score.name not in negligible]
    if obstacle := _no_effect(scores) or _ranking_obstacle(significant, len(negligible)):
        uninformative = isinstance(obstacle, Uninformative)
        if policy.on_uninformative == "reject":
            return Outcome(Decision.REJECTED, obstacle, uninformative=uninformative)
        picked = _sharp_negligible(scores, negligible, policy)
        return _admitted(picked, scores, policy, uninformative)

    sharp = select(scores, significant, policy)
    max_count = max_stripped_count(significant, policy)
    if len(sharp.counted) > max_count:
        return _rejected(
            TooManySharp(
                f"{len(sharp.counted)} of {len(significant)} scored modules are"
                f" {'under the threshold' if policy.scorer.by_alignment else 'sharp'}, and at most"
                f" {max_count} may be stripped"
            )
        )
    return _admitted(sharp.counted | sharp.uncounted, scores, policy)


def _admitted(
    picked: frozenset[str],
    scores: Sequence["ModuleScore"],
    policy: Policy,
    uninformative: bool = False,
) -> Outcome:
    """What the policy's action does to the modules that the rule picks."""
    decision = Decision.STRIPPED if picked else Decision.ADMITTED
    if policy.action == "strip":
        return Outcome(decision, stripped=picked, uninformative=uninformative)
    kept = {s.name: s.projected_share for s in scores if s.name in picked}
    # ΔW = 0 has no share; its projection is 0 too.
    removed = {name: 1.0 if share is None else 1.0 - share for name, share in kept.items()}
    return Outcome(decision, projected=removed, uninformative=uninformative)


def _sharp_negligible(
    scores: Sequence["ModuleScore"], negligible: frozenset[str], policy: Policy
) -> frozenset[str]:
    """Negligible modules that the rule picks among all modules; the others cannot be ranked."""
    if _ranking_obstacle(scores):
        return frozenset()
    picks = strip_rule(scores, policy)
    return frozenset(score.name for score in scores if score.name in negligible and picks(score))


def _rejected(refusal: AdapterRejected) -> Outcome:
    return Outcome(Decision.REJECTED, refusal)


def _over_limit(
    scores: Sequence["ModuleScore"], scaling: Mapping[str, float], policy: Policy
) -> OverLimit | None:
    """Check the magnitudes that SSI ignores: scaling, and norm relative to the median norm."""
    limits = policy.limits
    for name, value in scaling.items():
        if limits.max_scaling is not None and not abs(value) <= limits.max_scaling:
            return OverLimit(
                f"module {name} has scaling {value:g},"
                f" over limits.max_scaling {limits.max_scaling:g}"
            )
    if limits.max_norm_ratio is None or not scores:
        return None
    typical = median(score.frobenius_norm for score in scores)
    for score in scores:
        if score.frobenius_norm > limits.max_norm_ratio * typical:
            return OverLimit(
                f"module {score.name} has ‖ΔW‖_F {score.frobenius_norm:g}, over"
                f" limits.max_norm_ratio {limits.max_norm_ratio:g} times the median {typical:g}"
            )
    return None


def _no_effect(scores: Sequence["ModuleScore"]) -> NoEffect | None:
    if any(score.frobenius_norm for score in scores):
        return None
    return NoEffect(
        f"every update of its {len(scores)} scored modules is 0: lora_B is as it was before"
        " training, or alpha is 0"
    )


def _ranking_obstacle(
    scores: Sequence["ModuleScore"], negligible: int = 0
) -> AdapterRejected | None:
    """The reason why the index cannot rank these modules; None if it can."""
    ranked = [score.strip_order for score in scores if score.strip_order is not None]
    if len(ranked) < 2:
        return Unrankable(
            f"{len(ranked)} of {len(scores) + negligible} scored modules can be ranked, and ranking"
            f" takes two: {negligible} are negligible beside the largest, and"
            f" {len(scores) - len(ranked)} have no relative index (an update of rank 1 has none)"
        )
    # Alignment scores have no scale of their own, as the relative index has.
    scale = max(map(abs, ranked)) if scores[0].by_alignment else 1.0
    spread = max(ranked) - min(ranked)
    if spread < UNINFORMATIVE_SPREAD * scale or not spread:
        return Uninformative(
            f"the index spreads over {spread:.1e} only, under {UNINFORMATIVE_SPREAD * scale:g}"
        )
    return None
