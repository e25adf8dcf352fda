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
) -> RepairedAdapter | None:
    """Repair the modules of an adapter that are not stripped; None if there are none to repair.

    λ is the largest, one for all modules, that leaves `choice.residual` of their effect on harmful
    inputs. `between_modules` runs before each module and may raise to stop.

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
    found = _all_coordinates(modules, statistics, between_modules)
    lam = lambda_for(list(found.values()), choice.residual)
    if lam is None:
        raise RepairImpossible(f"no λ leaves {choice.residual:g} of the effect on harmful inputs")
    factors, effects, removed = [], {}, {}
    for module in modules:
        between_modules()
        new = _new_factor(module, found[module.name], lam)
        factors.append(new)
        effects[module.name] = effect(found[module.name], lam)
        removed[module.name] = 1.0 - (new.after / new.before) ** 2 if new.before else 1.0
    return RepairedAdapter(lam, effects, removed, ChangedWeights.of(adapter, factors))


def _all_coordinates(
    modules: Sequence[Module], statistics: StatisticsFile, between_modules: Callable[[], None]
) -> dict[str, Coordinates]:
    """The coordinates of all modules, those that share an input together."""
    sharing: dict[int, list[Module]] = {}
    for module in modules:
        own = statistics.by_module[module.name]
        if own.width != module.A.shape[1]:
            raise RepairImpossible(
                f"module {module.name} has {module.A.shape[1]} inputs, the statistics {own.width}"
            )
        sharing.setdefault(id(own), []).append(module)
    found: dict[str, Coordinates] = {}
    for members in sharing.values():
        between_modules()
        updates = [(module.B, module.A, module.scaling) for module in members]
        together = coordinates(updates, statistics.by_module[members[0].name])
        found |= {m.name: each for m, each in zip(members, together, strict=True)}
    return found


def _new_factor(module: Module, found: Coordinates, lam: float) -> NewFactor:
    new = projected(module.A, found, lam)
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
