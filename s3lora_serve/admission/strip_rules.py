"""Select the modules that the policy's strip rule picks, and the negligible ones. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from s3lora_serve.policy.schema import Policy

if TYPE_CHECKING:  # the command line starts without torch
    from s3lora_serve.spectral import ModuleScore

TIE_DIGITS = 9
"""Scores that agree to 1e-9 are ties, broken by name. Source: spec of MAS-SVD, pruning."""

MAD_TO_SIGMA = 1.482602218505602
"""Standard deviation of a normal over its median absolute deviation (MAD): 1 / Φ⁻¹(3/4)."""

MEAN_AD_TO_SIGMA = math.sqrt(math.pi / 2)
"""Standard deviation of a normal over its mean absolute deviation; used where the MAD is zero."""

Rule = Callable[["ModuleScore"], bool]


@dataclass(frozen=True, slots=True)
class Selection:
    """Names of the modules to strip."""

    counted: frozenset[str]  # against the rule's count and limits.max_stripped_fraction
    uncounted: frozenset[str]  # negligible ones


def energy_shares(scores: Sequence["ModuleScore"]) -> list[float]:
    """`‖ΔW‖_F² / Σ‖ΔW‖_F²` of each module; 0 if all updates are zero."""
    largest = max((score.frobenius_norm for score in scores), default=0.0)
    squares = [(score.frobenius_norm / largest) ** 2 if largest else 0.0 for score in scores]
    total = math.fsum(squares)
    return [square / total if total else 0.0 for square in squares]


def negligible_modules(scores: Sequence["ModuleScore"], share: float) -> frozenset[str]:
    """Modules with `‖ΔW‖_F² ≤ share · Σ‖ΔW'‖_F²` (sum over larger modules) or `ΔW = 0`.

    Small modules are not part of the sum, so no number of them changes which others count.
    """
    by_size = sorted(
        zip(energy_shares(scores), scores, strict=True), key=lambda pair: (-pair[0], pair[1].name)
    )
    larger = 0.0
    for place, (energy, _) in enumerate(by_size):
        if energy <= share * larger or energy == 0.0:
            return frozenset(score.name for _, score in by_size[place:])
        larger += energy
    return frozenset()


def select(
    scores: Sequence["ModuleScore"], significant: Sequence["ModuleScore"], policy: Policy
) -> Selection:
    """Apply the strip rule to the `significant` modules; the rest of `scores` is negligible.

    A negligible module is stripped, uncounted, if it is as sharp as the modules that the rule picks
    among the significant ones, or if the rule would pick it among all modules. An owner gains
    nothing by inflating one module until the others are negligible.
    """
    counts = {score.name for score in significant}
    rule, rule_over_all = strip_rule(significant, policy), strip_rule(scores, policy)
    small = [score for score in scores if score.name not in counts]
    return Selection(
        frozenset(score.name for score in significant if rule(score)),
        frozenset(score.name for score in small if rule(score) or rule_over_all(score)),
    )


def strip_rule(scores: Sequence["ModuleScore"], policy: Policy) -> Rule:
    """The policy's strip rule, with its bound computed from these modules."""
    name, value = policy.strip.rule
    max_count = max_stripped_count(scores, policy)
    if name == "top_k":
        return _sharpest(scores, min(int(value), max_count))
    if name == "fraction":
        return _sharpest(scores, min(_floor(value, len(scores)), max_count))
    if name == "threshold":
        return lambda s: _reaches(s, value)
    return _outlying(scores, value)


def max_stripped_count(scores: Sequence["ModuleScore"], policy: Policy) -> int:
    """`⌊limits.max_stripped_fraction · n⌋`: the number of these modules that may be stripped."""
    return _floor(policy.limits.max_stripped_fraction, len(scores))


def _sharpest(scores: Sequence["ModuleScore"], count: int) -> Rule:
    """Picks the modules that rank no lower than the last of the `count` sharpest."""
    ranked = sorted(order for score in scores if (order := _order(score)))
    if not count or not ranked:
        return lambda _: False
    last = ranked[:count][-1]

    def picked(score: "ModuleScore") -> bool:
        order = _order(score)
        return order is not None and order <= last

    return picked


def _order(score: "ModuleScore") -> tuple[float, str] | None:
    """Sort key of a module, the first to strip first; None if it cannot be ranked."""
    if score.strip_order is None:
        return None
    return -round(score.strip_order, TIE_DIGITS), score.name


def _reaches(score: "ModuleScore", bound: float) -> bool:
    """Whether SSI is at or above the bound, or an alignment score at or below it."""
    if score.by_alignment:
        return score.alignment is not None and round(bound - score.alignment, TIE_DIGITS) >= 0
    return score.ssi is not None and round(score.ssi - bound, TIE_DIGITS) >= 0


def _outlying(scores: Sequence["ModuleScore"], bound: float) -> Rule:
    """Picks the modules whose robust z-score `(x − median) / (1.4826·MAD)` exceeds `bound`."""
    values = [s.strip_order for s in scores if s.strip_order is not None]
    if not values:
        return lambda _: False
    middle = median(values)
    deviations = [abs(value - middle) for value in values]
    sigma = MAD_TO_SIGMA * median(deviations) or MEAN_AD_TO_SIGMA * fmean(deviations)

    def picked(score: "ModuleScore") -> bool:
        index = score.strip_order
        return index is not None and index - middle > bound * sigma

    return picked


def _floor(fraction: float, count: int) -> int:
    """`⌊fraction · count⌋`, corrected for rounding errors: 0.29 of 100 is 29."""
    return math.floor(round(fraction * count, TIE_DIGITS))
