"""What repair leaves of an adapter's effects, and the λ that leaves no more than may be."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import add, attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.factor_coordinates import Coordinates
from s3lora_serve.spectral.two_sided import SINGULAR, FactorPair, Surroundings

SMALLEST_LAMBDA = 1e-9
"""Under it nothing is left of what leading directions hold, to nine digits."""

AIM, FIRST_TRIES, CUT = 0.95, 4, 0.25
"""What is left falls about as λ does, so the next λ is in proportion, and a little less. After some
tries it is a quarter at most, so that the search ends. Ours."""

TOGETHER = 32
"""Modules that are solved in one batch: bounds what is copied for it."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Squared effects of an update, before and after repair: sums over modules add up."""

    harmful_before: float  # tr(G·ΔW·C_h·ΔWᵀ): of log-odds of refusals
    harmful_after: float
    benign_before: float  # tr(ΔW·C_b·ΔWᵀ)
    benign_lost: float  # tr((ΔW − ΔW')·C_b·(ΔW − ΔW')ᵀ)
    beyond: float  # bound on harmful_before of what the directions leave out

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(*map(add, _numbers(self), _numbers(other)))

    @property
    def residual(self) -> float:
        """Share of the effect on refusals that is left: `√(after/before)`; 0 without any."""
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


class RepairSolution(NamedTuple):
    """The repair of all modules of an adapter."""

    lam: float
    factors: Mapping[str, FactorPair]  # of one module each, without the first dimension
    effects: Mapping[str, Effect]

    @property
    def effect(self) -> Effect:
        """Of all modules together."""
        return sum(self.effects.values(), NO_EFFECT)


def solution(found: Mapping[str, Coordinates], lam: float) -> RepairSolution:
    """The factors and the effects of each module, for one λ."""
    return _solved(list(_stacks(found)), lam)


def largest_solution(
    found: Mapping[str, Coordinates], lam: float, most: float
) -> RepairSolution | None:
    """The solution for λ, or for a smaller one that leaves `harmful_after` ≤ most; else None."""
    stacks, tries = list(_stacks(found)), 0
    while lam >= SMALLEST_LAMBDA:
        made = _solved(stacks, lam)
        left = made.effect.harmful_after
        if left <= most:
            return made
        tries += 1
        cut = AIM * most / left
        lam *= cut if tries <= FIRST_TRIES else min(cut, CUT)
    return None


class _Stack(NamedTuple):
    """Modules of one shape."""

    names: list[str]
    surroundings: Surroundings
    square: Tensor  # (modules,)
    beyond: Tensor  # (modules,)

    def effects(self, new: FactorPair) -> list[Effect]:
        metric = self.surroundings
        own = metric.own
        sensitivity, benign = metric.sensitivity(own), metric.benign(own)
        rows = (
            _product(sensitivity, metric.harmful(own)),
            _product(metric.sensitivity(new), metric.harmful(new)),
            _product(metric.gram_b(own), benign),
            metric.lost(new),
            self.beyond * _product(sensitivity, benign),
        )
        return [Effect(*row) for row in (self.square * torch.stack(rows)).T.tolist()]


def _product(one: Tensor, other: Tensor) -> Tensor:
    """tr(one·other) of symmetric matrices, (modules,)."""
    return (one * other).sum((1, 2)).clamp_min(0.0)


def _solved(stacks: Sequence[_Stack], lam: float) -> RepairSolution:
    factors: dict[str, FactorPair] = {}
    effects: dict[str, Effect] = {}
    for stack in stacks:
        new = stack.surroundings.repaired(lam)
        factors |= {name: FactorPair(*(e[i] for e in new)) for i, name in enumerate(stack.names)}
        effects |= zip(stack.names, stack.effects(new), strict=True)
    return RepairSolution(lam, factors, effects)


def _stacks(found: Mapping[str, Coordinates]) -> Iterator[_Stack]:
    by_shape: dict[tuple[torch.Size, ...], list[str]] = {}
    for name, each in found.items():
        by_shape.setdefault((each.P.shape, each.S.shape), []).append(name)
    for alike in by_shape.values():
        for at in range(0, len(alike), TOGETHER):
            names = alike[at : at + TOGETHER]
            those = [found[name] for name in names]
            yield _Stack(
                names,
                _surroundings(those),
                torch.tensor([each.square for each in those], dtype=torch.float64),
                torch.tensor([each.inputs.beyond for each in those], dtype=torch.float64),
            )


def _column(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)[:, None]


def _surroundings(those: Sequence[Coordinates]) -> Surroundings:
    r = len(those[0].gram_a)
    unchanged = torch.eye(r, dtype=torch.float64).expand(len(those), r, r)
    return Surroundings(
        own=FactorPair(
            P=torch.stack([each.P for each in those]),
            X_a=unchanged,
            S=torch.stack([each.S for each in those]),
            X_b=unchanged,
        ),
        rest_a=torch.stack([each.rest_a for each in those]),
        rest_b=torch.stack([each.rest_b for each in those]),
        mu=torch.stack([each.inputs.mu for each in those]),
        mu_rest=_column(each.inputs.mu_rest for each in those),
        gamma=torch.stack([each.outputs.gamma for each in those]),
        gamma_rest=_column(each.outputs.gamma_rest for each in those),
        singular=_column(SINGULAR[each.products] for each in those),
    )
