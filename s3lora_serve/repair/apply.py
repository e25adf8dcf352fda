"""Repair an adapter: find λ for it, and the weights file with A' = A·M in the place of A."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from s3lora_serve.adapter.changed_weights import ChangedWeights, NewFactor, new_lora_a
from s3lora_serve.adapter.reader import Adapter, Module, as_served
from s3lora_serve.errors import RepairImpossible
from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.statistics_file import StatisticsFile
from s3lora_serve.spectral import Effect
from s3lora_serve.spectral.input_projection import (
    Coordinates,
    InputStatistics,
    Projected,
    coordinates,
    projected,
)
from s3lora_serve.spectral.projection_effects import NO_EFFECT, effects, lambda_for

MAX_GROWTH = 8.0
"""Largest ‖ΔW'‖_F/‖ΔW‖_F of a module. M is not symmetric: what harmful directions carried may be
expressed by others. Ours, not measured on real adapters yet."""


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
    found = _acting(groups, device, between_modules)
    if not found:
        return None
    lam = lambda_for(list(found.values()), choice.residual)
    if lam is None:
        raise RepairImpossible(f"no λ leaves {choice.residual:g} of the effect on harmful inputs")
    new: dict[str, NewFactor] = {}
    for _, members in groups:
        if acting := [module for module in members if module.name in found]:
            between_modules()
            new |= _new_factors(acting, [found[module.name] for module in acting], lam, device)
    return RepairedAdapter(
        strength=lam,
        effects=dict(zip(found, effects(list(found.values()), lam), strict=True)),
        removed={name: 1.0 - (each.after / each.before) ** 2 for name, each in new.items()},
        weights=ChangedWeights.of(adapter, new.values()),
    )


_Group = tuple[InputStatistics, list[Module]]


def _acting(
    groups: Sequence[_Group], device: str, between_modules: Callable[[], None]
) -> dict[str, Coordinates]:
    """The coordinates of the modules whose update is not 0."""
    found: dict[str, Coordinates] = {}
    for own, members in groups:
        between_modules()
        updates = [(as_served(m.B), as_served(m.A), m.scaling) for m in members]
        try:
            together = coordinates(updates, own, device)
        except ValueError as error:
            raise RepairImpossible(f"module {members[0].name}: {error}") from None
        found |= {m.name: each for m, each in zip(members, together, strict=True) if each.acts}
    return found


def _new_factors(
    modules: Sequence[Module], found: Sequence[Coordinates], lam: float, device: str
) -> dict[str, NewFactor]:
    """The checked A' of modules that share an input."""
    new = projected([module.A for module in modules], found, lam, device)
    return {
        module.name: _checked(module, each, one)
        for module, each, one in zip(modules, found, new, strict=True)
    }


def _sharing_an_input(modules: Sequence[Module], statistics: StatisticsFile) -> list[_Group]:
    groups: dict[int, _Group] = {}
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
