"""Safe LoRA and SPLoRA on the bench's aligned models, whose unaligned twin the bench has."""

from pathlib import Path
from typing import Any

import s3lora_serve
from s3lora_serve.lab.make_reference import ReferenceOptions, make_reference
from s3lora_serve.policy.file import with_options
from s3lora_serve.policy.method import ScorerChoice
from s3lora_serve.policy.schema import Policy
from tests.runs.evidence.adapters import Subject, make_adapter
from tests.runs.evidence.attribution import spearman
from tests.runs.evidence.base_model import Progress, aligned_base, unaligned_base
from tests.runs.evidence.measuring import kept
from tests.runs.evidence.orders import scoring
from tests.runs.evidence.stages import RESULTS, attribution
from tests.runs.evidence.wheels import CACHE

SCORERS = {"Safe LoRA": "safe-lora", "SPLoRA": "splora"}


def alignment_result(subject: Subject, progress: Progress) -> Any:
    """Both orders, what the reference captured, and the correlation with attribution."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)

    def made() -> Any:
        policy = alignment_policy(base)
        found: dict[str, Any] = {"orders": {}, "correlations": {}}
        harm = attribution(subject, progress)["modules"]
        for name, scorer in SCORERS.items():
            verdict = s3lora_serve.scan_adapter(folder, with_options(policy, scorer))
            score = {module.name: module.alignment or 0.0 for module in verdict.modules}
            found["orders"][name] = sorted(score, key=lambda each: (score[each], each))
            found["correlations"][name] = spearman(
                [-score[module["name"]] for module in harm], [module["harm"] for module in harm]
            )
            captured = sorted(module.captured or 0.0 for module in verdict.modules)
            found["captured"] = [captured[0], captured[len(captured) // 2]]
        return found

    return kept(RESULTS / f"alignment-{folder.name}.json", made)


def alignment_policy(base: Path) -> Policy:
    """A policy that scores by Safe LoRA with the reference of this base."""
    return with_options(scoring(ScorerChoice()), "safe-lora", _reference(base))


def _reference(base: Path) -> Path:
    file = (CACHE / "references" / f"{base.name}.safetensors").absolute()
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        make_reference(unaligned_base(), base, file, ReferenceOptions(dtype="float32"))
    return file
