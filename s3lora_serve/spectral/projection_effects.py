"""What the input projection leaves of an update, and the λ that leaves what is wanted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.input_projection import Coordinates

SMALLEST_LAMBDA, LARGEST_LAMBDA = 1e-6, 1e6
"""Beyond them M is, to six digits, the projection onto what no pair covers, or the identity."""

HALVINGS = 40
"""Of the interval in which λ is searched: to 1e-11 of λ."""

CORRECTIONS, CLOSENESS = 8, 5e-4
"""Each correction leaves a small part of what rounding to bfloat16 changes, under a hundredth."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Squared effects of an update, before and after the projection: sums over modules add up."""

    harmful_before: float  # tr(ΔW·C_h·ΔWᵀ), of the pairs kept
    harmful_after: float
    benign_before: float  # tr(ΔW·C_b·ΔWᵀ)
    benign_after: float
    benign_lost: float  # tr((ΔW − ΔW')·C_b·(ΔW − ΔW')ᵀ)
    beyond: float  # bound on what the pairs that are left out add to both harmful ones

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(*map(add, astuple(self), astuple(other)))

    @property
    def residual(self) -> float:
        """Share of the effect on harmful inputs that is left: `√(after/before)`; 0 without any."""
        return _root_share(self.harmful_after, self.harmful_before)

    @property
    def kept(self) -> float:
        """Share of the effect on benign inputs that is left; 1 without any."""
        return _root_share(self.benign_after, self.benign_before) if self.benign_before else 1.0

    @property
    def lost(self) -> float:
        """`‖(ΔW − ΔW')·X_b‖/‖ΔW·X_b‖`: how far the effect on benign inputs moved; 0 without any."""
        return _root_share(self.benign_lost, self.benign_before)


NO_EFFECT = Effect(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _root_share(part: float, whole: float) -> float:
    return (max(0.0, part) / whole) ** 0.5 if whole > 0 else 0.0


def effect(found: Coordinates, lam: float) -> Effect:
    """The effects of one module's update before and after the projection with λ.

    On C_b the pairs are an orthonormal frame, and the projection changes nothing beside it.
    """
    P, mu = found.P, found.statistics.mu
    weights = mu / (mu + lam)
    before = _energies(found)
    after = _energies(found._replace(P=P - (P * weights) @ found.statistics.overlap))
    captured = float(before.sum())
    beside = max(0.0, found.benign - captured)
    return Effect(
        harmful_before=float((mu * before).sum()),
        harmful_after=float((mu * after).sum()),
        benign_before=captured + beside,
        benign_after=float(after.sum()) + beside,
        benign_lost=float((weights.square() * before).sum()),
        beyond=found.statistics.beyond * beside,
    )


def _energies(found: Coordinates) -> Tensor:
    """‖ΔW·u‖² for each pair: the diagonal of s²·Pᵀ·BᵀB·P, (k,)."""
    return found.square * ((found.gram_b @ found.P) * found.P).sum(0).clamp_min(0.0)


def total_effect(found: Sequence[Coordinates], lam: float) -> Effect:
    """The effects of all modules together."""
    return sum((effect(each, lam) for each in found), NO_EFFECT)


def largest_lambda(found: Sequence[Coordinates], holds: Callable[[Effect], bool]) -> float | None:
    """The largest λ, which keeps most, for whose effects `holds`; None if for no λ.

    `holds` must be true for every smaller λ if it is for one. It sees the effects of pairs without
    rounding (`VᵀU = I`), which take no matrix product for a further λ.
    """
    pairs = _pairs(found)
    if not holds(pairs.effect(SMALLEST_LAMBDA)):
        return None
    low, high = math.log(SMALLEST_LAMBDA), math.log(LARGEST_LAMBDA)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(pairs.effect(math.exp(middle))) else (low, middle)
    return math.exp(low)


def lambda_for(found: Sequence[Coordinates], residual: float) -> float | None:
    """The largest λ that leaves `residual` of the effect on harmful inputs; None if no λ does.

    What rounding of V and U changes is made up for, to CLOSENESS of the residual.
    """
    wanted = residual
    for _ in range(CORRECTIONS):
        bound = wanted
        lam = largest_lambda(found, lambda effect: effect.residual <= bound)  # noqa: B023
        if lam is None:
            return None
        left = total_effect(found, lam).residual
        if not left or abs(left / residual - 1) <= CLOSENESS:
            return lam
        wanted *= residual / left
    return lam


class _Pairs(NamedTuple):
    """The pairs of all modules in one row."""

    mu: Tensor
    energies: Tensor
    beside: float  # effect on benign inputs beside the pairs
    beyond: float

    def effect(self, lam: float) -> Effect:
        weights = self.mu / (self.mu + lam)
        after = self.energies * (1 - weights).square()
        return Effect(
            harmful_before=float(self.mu @ self.energies),
            harmful_after=float(self.mu @ after),
            benign_before=float(self.energies.sum()) + self.beside,
            benign_after=float(after.sum()) + self.beside,
            benign_lost=float(weights.square() @ self.energies),
            beyond=self.beyond,
        )


def _pairs(found: Sequence[Coordinates]) -> _Pairs:
    energies = [_energies(each) for each in found]
    beside = [
        max(0.0, each.benign - float(own.sum())) for each, own in zip(found, energies, strict=True)
    ]
    beyond = (each.statistics.beyond * rest for each, rest in zip(found, beside, strict=True))
    mu = [each.statistics.mu for each in found]
    return _Pairs(torch.cat(mu), torch.cat(energies), sum(beside), sum(beyond))
