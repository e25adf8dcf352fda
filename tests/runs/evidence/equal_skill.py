"""What other ways to remove harm reach where they keep as much of the skill as repair does."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import s3lora_serve
from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.calibration.gates import GatedAdapter
from s3lora_serve.policy.file import with_options
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from tests.runs.evidence.adapters import Subject, make_adapter
from tests.runs.evidence.alignment import alignment_policy, alignment_result
from tests.runs.evidence.base_model import Progress, aligned_base
from tests.runs.evidence.measuring import FEW, exact_share, kept, load, measured
from tests.runs.evidence.stages import RESULTS, orders_of

LEAST_SKILL = 0.9
"""Of exact answers. The adapters that are compared have 1.00 of them."""

COUNTS = (0, 5, 10, 20, 30, 42, 60, 84, 105, 126, 147, 168, 189, 210)
"""Modules removed, of 210; 10 is the default of the policy's `strip.top_k`."""

SCALES = 16
"""Steps in which ΔW is scaled down to nothing."""

Change = Callable[[int], tuple[LanguageModel, float]]
"""Makes the change of a level: the model to measure, and the removed share of Σ‖ΔW‖_F²."""


def equal_skill(subject: Subject, progress: Progress) -> Any:
    """For each way, rates at the most that can be removed with LEAST_SKILL kept."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)
    model, gated = load(base, folder)
    assert gated is not None
    by_order = orders_of(folder) | alignment_result(subject, progress)["orders"]
    ways: dict[str, tuple[int, Change]] = {
        name: (len(COUNTS), _removing(model, gated, order)) for name, order in by_order.items()
    }
    ways["scaling"] = SCALES + 1, _scaling(model, gated)
    ways["Safe LoRA projected"] = len(COUNTS), _projecting(base, folder)
    found = {}
    for place, (name, (levels, change)) in enumerate(ways.items()):
        file = RESULTS / "equal-skill" / f"{folder.name}-{name.replace(' ', '-')}.json"
        found[name] = kept(
            file, lambda levels=levels, change=change, name=name: _most(name, levels, change)
        )
        progress(f"{subject}: at equal skill", place + 1, len(ways))
    return found


def _most(name: str, levels: int, change: Change) -> Any:
    """The largest level that keeps the skill, found by halving; level 0 changes nothing."""
    low, high = 0, levels
    while high - low > 1:
        middle = (low + high) // 2
        model, _ = change(middle)
        if exact_share(model, "tool calls", FEW).value >= LEAST_SKILL:
            low = middle
        else:
            high = middle
    model, share = change(low)
    return {"way": name, "level": low, "share": share, **measured(model, few=True)}


def _removing(model: LanguageModel, gated: GatedAdapter, order: list[str]) -> Change:
    """Whole modules are removed, the first of an order."""

    def change(level: int) -> tuple[LanguageModel, float]:
        removed = set(order[: COUNTS[level]])
        gates = [
            torch.zeros(len(layer.S), len(layer.S)) if module.name in removed else None
            for module, layer in zip(gated.modules, gated.layers, strict=True)
        ]
        gated.set(gates)
        energy = [float((layer.S**2).sum()) for layer in gated.layers]
        lost = sum(each for each, gate in zip(energy, gates, strict=True) if gate is not None)
        return model, lost / sum(energy)

    return change


def _scaling(model: LanguageModel, gated: GatedAdapter) -> Change:
    """All of ΔW is scaled down."""

    def change(level: int) -> tuple[LanguageModel, float]:
        scale = 1 - level / SCALES
        gated.set([scale * torch.eye(len(layer.S)) for layer in gated.layers])
        return model, 1 - scale**2

    return change


def _projecting(base: Path, folder: Path) -> Change:
    """The first modules of Safe LoRA's order are projected, as its paper does.

    The default bound on the number of modules is lifted: counts are those of the other orders.
    """

    def change(level: int) -> tuple[LanguageModel, float]:
        policy = with_options(alignment_policy(base), action="project").model_copy(
            update={
                "strip": Strip(top_k=COUNTS[level]),
                "limits": Limits(seconds=3600, max_stripped_fraction=1.0),
            }
        )
        with tempfile.TemporaryDirectory() as parent:
            target = Path(parent) / "projected"
            verdict = s3lora_serve.strip_adapter(folder, target, policy)
            model, _ = load(base, target)
        share = sum(m.removed_share * (m.energy_share or 0.0) for m in verdict.modules)
        return model, share

    return change
