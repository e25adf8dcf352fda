"""What the input projection leaves of an update, and the λ that leaves what is wanted."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import add, attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.input_projection import Coordinates

SMALLEST_LAMBDA, LARGEST_LAMBDA = 1e-6, 1e6
"""Beyond them M is, to six digits, the projection onto what no pair covers, or the identity."""

HALVINGS = 40
"""Of the interval in which λ is searched: to 1e-11 of λ."""

TOGETHER = 32
"""Modules whose figures are made in one product: bounds what is copied for it."""

CORRECTIONS, CLOSENESS = 8, 5e-4
"""Each correction leaves a small part of what rounding to bfloat16 changes, under a hundredth."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Squared effects of an update, before and after the projection: sums over modules add up."""

    harmful_before: float  # tr(ΔW·C_h·ΔWᵀ), of the pairs kept
    harmful_after: float
    benign_before: float  # tr(ΔW·C_b·ΔWᵀ)
    benign_lost: float  # tr((ΔW − ΔW')·C_b·(ΔW − ΔW')ᵀ)
    beyond: float  # bound on what the pairs that are left out add to both harmful ones

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(*map(add, _numbers(self), _numbers(other)))

    @property
    def residual(self) -> float:
        """Share of the effect on harmful inputs that is left: `√(after/before)`; 0 without any."""
        return _root_share(self.harmful_after, self.harmful_before)

    @property
    def kept(self) -> float:
        """Share of the effect on benign inputs that is surely left, `1 − lost`; 1 without any."""
        return max(0.0, 1.0 - self.lost)

    @property
    def lost(self) -> float:
        """`‖(ΔW − ΔW')·X_b‖/‖ΔW·X_b‖`: how far the effect on benign inputs moved; 0 without any."""
        return _root_share(self.benign_lost, self.benign_before)


_numbers = attrgetter(*(field.name for field in fields(Effect)))

NO_EFFECT = Effect(0.0, 0.0, 0.0, 0.0, 0.0)


def _root_share(part: float, whole: float) -> float:
    return (max(0.0, part) / whole) ** 0.5 if whole > 0 else 0.0


def effects(found: Sequence[Coordinates], lam: float) -> list[Effect]:
    """The effects of each module's update before and after the projection with λ.

    `A'·C_h·A'ᵀ = A·C_h·Aᵀ − Σ μ·(1 − (λ/(μ+λ))²)·(A·u)·(A·u)ᵀ`: what is beside the pairs stays.
    """
    made = [NO_EFFECT] * len(found)
    for stack in _stacks(found):
        for place, numbers in zip(stack.places, stack.effects(lam).tolist(), strict=True):
            made[place] = Effect(*numbers)
    return made


def total_effect(found: Sequence[Coordinates], lam: float) -> Effect:
    """The effects of all modules together."""
    return sum(effects(found, lam), NO_EFFECT)


class _Stack(NamedTuple):
    """Modules of one shape."""

    places: list[int]  # among all modules
    P: Tensor  # (modules, r, k)
    gram_b: Tensor  # (modules, r, r)
    square: Tensor  # (modules, 1)
    mu: Tensor  # (modules, k)
    overlap: Tensor  # (modules, k, k)
    benign: Tensor  # (modules,)
    beyond: Tensor  # (modules,)

    def energies(self, P: Tensor) -> Tensor:
        """‖ΔW·u‖² for each pair: the diagonal of s²·Pᵀ·BᵀB·P, (modules, k)."""
        return self.square * ((self.gram_b @ P) * P).sum(1).clamp_min(0.0)

    def effects(self, lam: float) -> Tensor:
        """The numbers of each module's `Effect`, (modules, 5)."""
        weights = self.mu / (self.mu + lam)
        before = self.energies(self.P)
        after = self.energies(self.P - (self.P * weights[:, None]) @ self.overlap)
        rows = (
            (self.mu * before).sum(1),
            (self.mu * after).sum(1),
            self.benign,
            (weights.square() * before).sum(1),
            self.beyond * self.benign,
        )
        return torch.stack(rows, 1)


def _stacks(found: Sequence[Coordinates]) -> Iterator[_Stack]:
    by_shape: dict[torch.Size, list[int]] = {}
    for place, each in enumerate(found):
        by_shape.setdefault(each.P.shape, []).append(place)
    for alike in by_shape.values():
        for at in range(0, len(alike), TOGETHER):
            places = alike[at : at + TOGETHER]
            those = [found[place] for place in places]
            own = [each.statistics for each in those]
            yield _Stack(
                places,
                torch.stack([each.P for each in those]),
                torch.stack([each.gram_b for each in those]),
                torch.tensor([[each.square] for each in those], dtype=torch.float64),
                torch.stack([each.mu for each in own]),
                torch.stack([each.overlap for each in own]),
                torch.tensor([each.benign for each in those], dtype=torch.float64),
                torch.tensor([each.beyond for each in own], dtype=torch.float64),
            )


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
    benign: float
    beyond: float

    def effect(self, lam: float) -> Effect:
        weights = self.mu / (self.mu + lam)
        after = self.energies * (1 - weights).square()
        return Effect(
            harmful_before=float(self.mu @ self.energies),
            harmful_after=float(self.mu @ after),
            benign_before=self.benign,
            benign_lost=float(weights.square() @ self.energies),
            beyond=self.beyond,
        )


def _pairs(found: Sequence[Coordinates]) -> _Pairs:
    mu, energies, benign, beyond = [], [], 0.0, 0.0
    for stack in _stacks(found):
        mu.append(stack.mu.flatten())
        energies.append(stack.energies(stack.P).flatten())
        benign += float(stack.benign.sum())
        beyond += float(stack.beyond @ stack.benign)
    return _Pairs(torch.cat(mu), torch.cat(energies), benign, beyond)
