"""An owner who trains against repair: the adapter learns as the gate would serve it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.statistics_file import read_statistics
from s3lora_serve.spectral.factor_coordinates import Coordinates, coordinates, new_factors
from s3lora_serve.spectral.repair_effects import largest_solution
from tests.runs.evidence.base_statistics import statistics

PREFIX = "base_model.model."
"""What PEFT writes before the names of modules."""


def in_the_loop(
    base: Path, progress: Callable[[str, int, int], None]
) -> Callable[[Any], Callable[[], AbstractContextManager[None]]]:
    """What makes the contexts of training an adapter as a base's statistics repair it."""
    return lambda wrapped: served_as_repaired(wrapped, statistics(base, None, progress))


def served_as_repaired(wrapped: Any, file: Path) -> Callable[[], AbstractContextManager[None]]:
    """Contexts in which PEFT's adapter has the factors of its repair.

    A gradient that is taken within is that of the repaired factors. The owner's optimizer applies
    it to the adapter's own: repair is treated as if it changed nothing.
    """
    known, choice = read_statistics(file), RepairChoice(statistics=file)
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A")
    }

    @contextmanager
    def repaired() -> Iterator[None]:
        own = {name: _factors(layer) for name, layer in layers.items()}
        found: dict[str, Coordinates] = {}
        for name, (B, A) in own.items():
            update = (B.detach(), A.detach(), layers[name].scaling["default"])
            [each] = coordinates([update], known.by_module[name], [known.outputs[name]])
            if each.acts:
                found[name] = each
        kept = {name: [factor.data for factor in own[name]] for name in found}
        solved = largest_solution(found, choice.strength, choice.max_effect**2 * known.energy)
        for name, each in found.items():
            assert solved is not None
            B, A = own[name]
            [new] = new_factors([(B.data, A.data)], [each], [solved.factors[name]])
            B.data, A.data = new.B, new.A
        try:
            yield
        finally:
            for name, factors in kept.items():
                for factor, data in zip(own[name], factors, strict=True):
                    factor.data = data

    return repaired


def _factors(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """B and A."""
    return layer.lora_B["default"].weight, layer.lora_A["default"].weight
