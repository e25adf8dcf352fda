"""Repair an adapter: find λ for it, and the weights file with B' and A' in the place of its own."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from s3lora_serve.adapter.changed_weights import ChangedWeights, Grams, NewFactor, new_pair
from s3lora_serve.adapter.reader import Adapter, Module, as_served
from s3lora_serve.errors import RepairImpossible
from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.statistics_file import StatisticsFile
from s3lora_serve.spectral import Effect
from s3lora_serve.spectral.factor_coordinates import Coordinates, coordinates, new_factors
from s3lora_serve.spectral.repair_effects import RepairSolution, largest_solution

MAX_GROWTH = 8.0
"""Largest ‖ΔW'‖_F/‖ΔW‖_F of a module. What harmful directions carried may be expressed by others,
of more inputs. Ours, not measured on real adapters yet."""


@dataclass(frozen=True, slots=True)
class RepairedAdapter:
    """What repairing does to one adapter."""

    strength: float  # λ
    effect: Effect  # of all repaired modules together
    size: float  # of the effect on refusals that is left, √(harmful_after/Σ E‖y‖²)
    suspicion: float | None  # of the whole update; None: the statistics do not say
    effects: Mapping[str, Effect]  # by module
    removed: Mapping[str, float]  # by module: 1 − ‖ΔW'‖_F²/‖ΔW‖_F², < 0 if it grows
    weights: ChangedWeights


def repaired(
    adapter: Adapter,
    statistics: StatisticsFile,
    choice: RepairChoice,
    stripped: Collection[str] = (),
    between_modules: Callable[[], None] = lambda: None,
) -> RepairedAdapter | None:
    """Repair the modules of an adapter that are not stripped; None if there are none to repair.

    λ, one for all modules, is `choice.strength`, or as much smaller as `choice.max_effect` wants.
    `between_modules` runs before the modules of each input and may raise to stop.

    Raises:
        RepairImpossible: the statistics lack a module, or have it with another width; B' or A' is
            not finite, they cancel, or they make an update MAX_GROWTH times larger.
    """
    modules = [module for module in adapter.modules if module.name not in stripped]
    missing = [module.name for module in modules if module.name not in statistics.by_module]
    if missing and choice.on_missing == "reject":
        raise RepairImpossible(f"the statistics lack {missing[0]} (of {len(missing)} they lack)")
    modules = [module for module in modules if module.name in statistics.by_module]
    if not modules:
        return None
    groups = _sharing_an_input(modules, statistics)
    found = _acting(groups, statistics, between_modules)
    if not found:
        return None
    most = choice.max_effect**2 * statistics.energy
    solved = largest_solution(found, choice.strength, most)
    if solved is None:
        raise RepairImpossible(f"no λ leaves an effect on refusals under {choice.max_effect:g}")
    new: dict[str, tuple[NewFactor, NewFactor]] = {}
    for members in groups:
        if acting := [module for module in members if module.name in found]:
            between_modules()
            new |= _new_pairs(acting, found, solved)
    return RepairedAdapter(
        strength=solved.lam,
        effect=solved.effect,
        size=math.sqrt(solved.effect.harmful_after / statistics.energy),
        suspicion=_suspicion(found.values(), solved.effect, statistics),
        effects=solved.effects,
        removed={name: 1.0 - (B.after / B.before) ** 2 for name, (B, _) in new.items()},
        weights=ChangedWeights.of(adapter, chain.from_iterable(new.values())),
    )


def _suspicion(
    found: Iterable[Coordinates], effect: Effect, statistics: StatisticsFile
) -> float | None:
    """Log-odds of a refusal that updates take away, for each percent that they move benign outputs.

    `−Σ tr(ΔWᵀ·C) / (100·√(Σ tr(ΔW·C_b·ΔWᵀ) / Σ E‖y‖²))`. An owner who makes an update larger where
    it does nothing, or scales it, does not change it. None if the statistics have no shifts.
    """
    shifts = [each.shift for each in found]
    moved = math.sqrt(max(0.0, effect.benign_before) / statistics.energy)
    if None in shifts or not moved:
        return None
    return -sum(shift for shift in shifts if shift is not None) / (100 * moved)


_Group = list[Module]


def _acting(
    groups: Sequence[_Group],
    statistics: StatisticsFile,
    between_modules: Callable[[], None],
) -> dict[str, Coordinates]:
    """The coordinates of the modules whose update is not 0."""
    found: dict[str, Coordinates] = {}
    for members in groups:
        between_modules()
        updates = [(as_served(m.B), as_served(m.A), m.scaling) for m in members]
        outputs = [statistics.outputs[m.name] for m in members]
        try:
            inputs = statistics.by_module[members[0].name]
            together = coordinates(updates, inputs, outputs)
        except ValueError as error:
            raise RepairImpossible(f"module {members[0].name}: {error}") from None
        found |= {m.name: each for m, each in zip(members, together, strict=True) if each.acts}
    return found


def _new_pairs(
    modules: Sequence[Module], found: Mapping[str, Coordinates], solved: RepairSolution
) -> dict[str, tuple[NewFactor, NewFactor]]:
    """The checked factors of modules that share an input."""
    those = [found[module.name] for module in modules]
    new = new_factors(
        [(module.B, module.A) for module in modules],
        those,
        [solved.factors[module.name] for module in modules],
    )
    pairs = {}
    for module, own, each in zip(modules, those, new, strict=True):
        before, after = Grams(own.gram_b, own.gram_a), Grams(each.gram_b, each.gram_a)
        try:
            pair = new_pair(module, each.B, each.A, before, after)
        except ValueError as error:
            raise RepairImpossible(f"the repair {error}") from None
        if not after.update <= MAX_GROWTH * before.update:
            raise RepairImpossible(
                f"the repair makes ‖ΔW‖_F of {module.name} {after.update:g} of {before.update:g},"
                f" over {MAX_GROWTH:g} times"
            )
        pairs[module.name] = pair
    return pairs


def _sharing_an_input(modules: Sequence[Module], statistics: StatisticsFile) -> list[_Group]:
    groups: dict[int, _Group] = {}
    for module in modules:
        inputs, outputs = statistics.by_module[module.name], statistics.outputs[module.name]
        have = {"inputs": module.A.shape[1], "outputs": module.B.shape[0]}
        expected = {"inputs": inputs.width, "outputs": outputs.width}
        if wrong := [side for side in have if have[side] != expected[side]]:
            side = wrong[0]
            raise RepairImpossible(
                f"module {module.name} has {have[side]} {side}, the statistics {expected[side]}"
            )
        groups.setdefault(id(inputs), []).append(module)
    return list(groups.values())
