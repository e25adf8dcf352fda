"""The part of a verdict on each module: its score, and what the outcome does to it."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.admission.decision import Outcome
from s3lora_serve.admission.strip_rules import energy_shares, negligible_modules
from s3lora_serve.admission.verdict import ModuleVerdict
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.apply import RepairedAdapter
from s3lora_serve.spectral import ModuleScore


def module_verdicts(
    adapter: Adapter,
    scores: Sequence[ModuleScore],
    outcome: Outcome,
    policy: Policy,
    repair: RepairedAdapter | None = None,
) -> tuple[ModuleVerdict, ...]:
    """A verdict for each module of the adapter, those that were not scored included."""
    shares = energy_shares(scores)
    scored = {score.name: (score, share) for score, share in zip(scores, shares, strict=True)}
    negligible = negligible_modules(scores, policy.negligible)
    return tuple(
        _module_verdict(
            module,
            *scored.get(module.name, (None, None)),
            outcome=outcome,
            negligible=module.name in negligible,
            repair=repair,
        )
        for module in adapter.modules
    )


def _module_verdict(
    module: Module,
    score: ModuleScore | None,
    energy_share: float | None,
    *,
    outcome: Outcome,
    negligible: bool,
    repair: RepairedAdapter | None,
) -> ModuleVerdict:
    stripped = module.name in outcome.stripped
    changes = outcome.transformed, outcome.projected, repair.removed if repair else {}
    removed = next((each[module.name] for each in changes if module.name in each), 0.0)
    effect = repair.effects.get(module.name) if repair else None
    return ModuleVerdict(
        name=module.name,
        layer=module.layer,
        projection=module.projection,
        shape=module.shape,
        rank=module.rank,
        **_scored(score),
        stripped=stripped,
        energy_share=energy_share,
        negligible=negligible,
        transformed=module.name in outcome.transformed,
        removed_share=1.0 if stripped else removed,
        projected=module.name in outcome.projected,
        repaired=effect is not None,
        residual=effect.residual if effect else None,
        kept=effect.kept if effect else None,
    )


_OWN = {each.name for each in fields(ModuleVerdict)} - {"name"}
_SCORED = [each.name for each in fields(ModuleScore) if each.name in _OWN]
"""What a module's verdict takes over from its score."""


def _scored(score: ModuleScore | None) -> dict[str, Any]:
    if score is None:
        return dict.fromkeys(_SCORED) | {"spectrum": ()}
    return {name: getattr(score, name) for name in _SCORED}
