"""Orders in which whole modules are removed, for comparison with repair and plans."""

import random
from collections.abc import Callable
from pathlib import Path

import s3lora_serve
from s3lora_serve.admission.verdict import ModuleVerdict
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import ScorerChoice
from s3lora_serve.policy.schema import Policy

DRAWS = 3
"""Random orders."""


def orders(folder: Path) -> dict[str, list[str]]:
    """Module names in the order of their removal, by the name of the order."""
    indices = {
        "SSI": ScorerChoice(),
        "svd": ScorerChoice(name="svd"),
    }
    found = {}
    modules: tuple[ModuleVerdict, ...] = ()
    for name, scorer in indices.items():
        modules = s3lora_serve.scan_adapter(folder, scoring(scorer)).modules
        found[name] = _descending(modules, lambda module: module.relative_ssi or 0.0)
    found["norm"] = _descending(modules, lambda module: module.energy_share or 0.0)
    found["last layers"] = _descending(modules, lambda module: module.layer or 0)
    for draw in range(DRAWS):
        found[f"random {draw}"] = _shuffled([module.name for module in modules], draw)
    return found


def scoring(scorer: ScorerChoice) -> Policy:
    """A policy to score by: the dense indices take longer than a server would wait."""
    return Policy(scorer=scorer, on_uninformative="admit", limits=Limits(seconds=3600))


def _descending(
    modules: tuple[ModuleVerdict, ...], value: Callable[[ModuleVerdict], float]
) -> list[str]:
    return [m.name for m in sorted(modules, key=lambda m: (-value(m), m.name))]


def _shuffled(names: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(names, len(names))
