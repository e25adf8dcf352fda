"""Repair an adapter: find λ for it, and the weights file with A' = A·M in the place of A."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from s3lora_serve.adapter.changed_weights import ChangedWeights, NewFactor, new_lora_a
from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.errors import RepairImpossible
from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.statistics_file import StatisticsFile
from s3lora_serve.spectral import Effect
from s3lora_serve.spectral.input_projection import (
    NO_EFFECT,
    Coordinates,
    InputStatistics,
    Projected,
    coordinates,
    effect,
    lambda_for,
    projected,
)

MAX_GROWTH = 8.0
"""Largest ‖ΔW'‖_F/‖ΔW‖_F of a module. M is not symmetric: what harmful directions carried may be
expressed by others. 2.6 was the most at ε = 0.1 on real adapters (docs/repair.md)."""


@dataclass(frozen=True, slots=True)
class RepairedAdapter:
    """What repairing does to one adapter."""

    strength: float  # λ
    effects: Mapping[str, Effect]  # by module
    removed: Mapping[str, float]  # by module: 1 − ‖ΔW'‖_F²/‖ΔW‖_F², < 0 if it grows
    weights: ChangedWeights

    @property
    def effect(self) -> Effect:
        """Of all repaired modules together."""
        return sum(self.effects.values(), NO_EFFECT)


def repaired(
    adapter: Adapter,
    statistics: StatisticsFile,
    choice: RepairChoice,
    stripped: Collection[str] = (),
    between_modules: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> RepairedAdapter | None:
    """Repair the modules of an adapter that are not stripped; None if there are none to repair.

    λ is the largest, one for all modules, that leaves `choice.residual` of their effect on harmful
    inputs. `between_modules` runs before the modules of each input and may raise to stop. `device`
    multiplies; the rest is the host's.

    Raises:
        RepairImpossible: the statistics lack a module, or have it with another width; A' is not
            finite, cancels, or makes an update MAX_GROWTH times larger.
    """
    modules = [module for module in adapter.modules if module.name not in stripped]
    missing = [module.name for module in modules if module.name not in statistics.by_module]
    if missing and choice.on_missing == "reject":
        raise RepairImpossible(f"the statistics lack {missing[0]} (of {len(missing)} they lack)")
    modules = [module for module in modules if module.name in statistics.by_module]
    if not modules:
        return None
    groups = _sharing_an_input(modules, statistics)
    found: dict[str, Coordinates] = {}
    for own, members in groups:
        between_modules()
        updates = [(module.B, module.A, module.scaling) for module in members]
        found |= zip((m.name for m in members), coordinates(updates, own, device), strict=True)
    lam = lambda_for(list(found.values()), choice.residual)
    if lam is None:
        raise RepairImpossible(f"no λ leaves {choice.residual:g} of the effect on harmful inputs")
    new: dict[str, NewFactor] = {}
    for _, members in groups:
        between_modules()
        known = [found[module.name] for module in members]
        for module, each, one in zip(
            members, known, projected([m.A for m in members], known, lam), strict=True
        ):
            new[module.name] = _checked(module, each, one)
    return RepairedAdapter(
        strength=lam,
        effects={name: effect(each, lam) for name, each in found.items()},
        removed={name: _removed(factor) for name, factor in new.items()},
        weights=ChangedWeights.of(adapter, new.values()),
    )


def _sharing_an_input(
    modules: Sequence[Module], statistics: StatisticsFile
) -> list[tuple[InputStatistics, list[Module]]]:
    groups: dict[int, tuple[InputStatistics, list[Module]]] = {}
    for module in modules:
        own = statistics.by_module[module.name]
        if own.width != module.A.shape[1]:
            raise RepairImpossible(
                f"module {module.name} has {module.A.shape[1]} inputs, the statistics {own.width}"
            )
        groups.setdefault(id(own), (own, []))[1].append(module)
    return list(groups.values())


def _checked(module: Module, found: Coordinates, new: Projected) -> NewFactor:
    try:
        factor = new_lora_a(module, new.A, new.gram, found.gram_a, found.gram_b)
    except ValueError as error:
        raise RepairImpossible(f"the repair {error}") from None
    if not factor.after <= MAX_GROWTH * factor.before:
        raise RepairImpossible(
            f"the repair makes ‖ΔW‖_F of {module.name} {factor.after:g} of {factor.before:g}, over"
            f" {MAX_GROWTH:g} times"
        )
    return factor


def _removed(factor: NewFactor) -> float:
    return 1.0 - (factor.after / factor.before) ** 2 if factor.before else 1.0
