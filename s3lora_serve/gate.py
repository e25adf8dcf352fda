"""The gate: scores and a policy in, a ruling out. Pure; knows neither files nor vLLM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
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
from s3lora_serve.verdict import Decision

if TYPE_CHECKING:  # the command line starts without torch
    from s3lora_serve.spectral import ModuleScore

UNINFORMATIVE_SPREAD = 1e-3
"""Spread of relative SSI below which the index does not rank. Spec of MAS-SVD, facts."""

TIE_DIGITS = 9
"""Scores that agree to 1e-9 are ties, broken by name. Spec of MAS-SVD, pruning."""

MAD_TO_SIGMA = 1.482602218505602
"""Median absolute deviation to standard deviation of a normal: 1 / Φ⁻¹(3/4)."""

MEAN_AD_TO_SIGMA = math.sqrt(math.pi / 2)
"""Mean absolute deviation to standard deviation of a normal; used where the median's is zero."""


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
    if blindness := _blind(scores):
        uninformative = isinstance(blindness, Uninformative)
        if policy.on_uninformative == "reject":
            return Ruling(Decision.REJECTED, blindness, uninformative=uninformative)
        return Ruling(Decision.ADMITTED, uninformative=uninformative)

    sharp = _sharp(scores, policy)
    most = _floor(policy.limits.max_stripped_fraction, len(scores))
    if len(sharp) > most:
        return _rejected(
            TooManySharp(
                f"{len(sharp)} of {len(scores)} scored modules are sharp, and at most {most} may go"
            )
        )
    return Ruling(Decision.STRIPPED if sharp else Decision.ADMITTED, stripped=frozenset(sharp))


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


def _blind(scores: Sequence["ModuleScore"]) -> AdapterRejected | None:
    """Why the index cannot rank these modules, if it cannot."""
    ranked = [score.relative_ssi for score in scores if score.relative_ssi is not None]
    if len(ranked) < 2:
        return Unrankable(
            f"{len(ranked)} of {len(scores)} scored modules have a relative index, and ranking"
            " takes two (an update of zero or of rank 1 has none)"
        )
    spread = max(ranked) - min(ranked)
    if spread < UNINFORMATIVE_SPREAD:
        return Uninformative(
            f"the relative index spreads over {spread:.1e} only, under {UNINFORMATIVE_SPREAD:g}"
        )
    return None


def _sharp(scores: Sequence["ModuleScore"], policy: Policy) -> list[str]:
    """Names of the modules that the policy's strip rule picks."""
    name, value = policy.strip.rule
    most = _floor(policy.limits.max_stripped_fraction, len(scores))
    if name == "top_k":
        return _sharpest(scores, min(int(value), most))
    if name == "fraction":
        return _sharpest(scores, min(_floor(value, len(scores)), most))
    if name == "threshold":
        return [
            s.name for s in scores if s.ssi is not None and round(s.ssi - value, TIE_DIGITS) >= 0
        ]
    return _outliers(scores, value)


def _sharpest(scores: Sequence["ModuleScore"], count: int) -> list[str]:
    ranked = [(s.relative_ssi, s.name) for s in scores if s.relative_ssi is not None]
    ranked.sort(key=lambda pair: (-round(pair[0], TIE_DIGITS), pair[1]))
    return [name for _, name in ranked[:count]]


def _outliers(scores: Sequence["ModuleScore"], bound: float) -> list[str]:
    """Modules whose robust z-score `(x − median) / (1.4826·MAD)` exceeds `bound`."""
    ranked = {s.name: s.relative_ssi for s in scores if s.relative_ssi is not None}
    middle = median(ranked.values())
    deviations = [abs(value - middle) for value in ranked.values()]
    sigma = MAD_TO_SIGMA * median(deviations) or MEAN_AD_TO_SIGMA * fmean(deviations)
    return [name for name, value in ranked.items() if (value - middle) / sigma > bound]


def _floor(fraction: float, count: int) -> int:
    """`⌊fraction · count⌋`, forgiving the last bit: 0.29 of 100 is 29."""
    return math.floor(round(fraction * count, TIE_DIGITS))
