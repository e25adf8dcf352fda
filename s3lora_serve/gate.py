"""The gate: scores and a policy in, a ruling out. Pure; knows neither files nor vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from s3lora_serve.errors import (
    AdapterRejected,
    Denied,
    OverLimit,
    TooManySharp,
    Uninformative,
    Unrankable,
)
from s3lora_serve.policy import Policy
from s3lora_serve.selection import largest_count, negligible_modules, select, strip_rule
from s3lora_serve.verdict import Decision

if TYPE_CHECKING:  # the command line starts without torch
    from s3lora_serve.spectral import ModuleScore

UNINFORMATIVE_SPREAD = 1e-3
"""Spread of relative SSI below which the index does not rank. Spec of MAS-SVD, facts."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the gate decided; `stripped` holds module names."""

    decision: Decision
    refusal: AdapterRejected | None = None
    stripped: frozenset[str] = frozenset()
    uninformative: bool = False


def rule(
    scores: Sequence["ModuleScore"], scaling: Mapping[str, float], digest: str, policy: Policy
) -> Ruling:
    """Decide on one adapter from the scores of its selected modules.

    `scores` are finite; `scaling` holds s of every module of the adapter; `policy` is the one for
    this adapter.
    """
    if digest in policy.deny:
        return _rejected(Denied(f"the adapter {digest} is on the policy's deny list"))
    if excess := _over_limit(scores, scaling, policy):
        return _rejected(excess)
    if digest in policy.allow:  # the digest is the weights'; what s makes of them is bounded above
        return Ruling(Decision.ADMITTED)
    negligible = negligible_modules(scores, policy.negligible)
    weighty = [score for score in scores if score.name not in negligible]
    if blindness := _blind(weighty, len(negligible)):
        uninformative = isinstance(blindness, Uninformative)
        if policy.on_uninformative == "reject":
            return Ruling(Decision.REJECTED, blindness, uninformative=uninformative)
        return _admitted(_sharp_beside_all(scores, negligible, policy), uninformative)

    sharp = select(scores, weighty, policy)
    most = largest_count(weighty, policy)
    if len(sharp.counted) > most:
        return _rejected(
            TooManySharp(
                f"{len(sharp.counted)} of {len(weighty)} scored modules are sharp, and at most"
                f" {most} may go"
            )
        )
    return _admitted(sharp.counted | sharp.uncounted)


def _admitted(stripped: frozenset[str], uninformative: bool = False) -> Ruling:
    decision = Decision.STRIPPED if stripped else Decision.ADMITTED
    return Ruling(decision, stripped=stripped, uninformative=uninformative)


def _sharp_beside_all(
    scores: Sequence["ModuleScore"], negligible: frozenset[str], policy: Policy
) -> frozenset[str]:
    """Negligible modules that go where sizes do not matter; the others cannot be ranked."""
    if _blind(scores):
        return frozenset()
    rule = strip_rule(scores, policy)
    return frozenset(score.name for score in scores if score.name in negligible and rule(score))


def _rejected(refusal: AdapterRejected) -> Ruling:
    return Ruling(Decision.REJECTED, refusal)


def _over_limit(
    scores: Sequence["ModuleScore"], scaling: Mapping[str, float], policy: Policy
) -> OverLimit | None:
    """The magnitudes that SSI cannot see: s, and one module's norm against the others'."""
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


def _blind(scores: Sequence["ModuleScore"], negligible: int = 0) -> AdapterRejected | None:
    """Why the index cannot rank these modules, if it cannot."""
    ranked = [score.relative_ssi for score in scores if score.relative_ssi is not None]
    if len(ranked) < 2:
        return Unrankable(
            f"{len(ranked)} of {len(scores) + negligible} scored modules can be ranked, and ranking"
            f" takes two: {negligible} are negligible beside the largest, and"
            f" {len(scores) - len(ranked)} have no relative index (an update of rank 1 has none)"
        )
    spread = max(ranked) - min(ranked)
    if spread < UNINFORMATIVE_SPREAD:
        return Uninformative(
            f"the relative index spreads over {spread:.1e} only, under {UNINFORMATIVE_SPREAD:g}"
        )
    return None
