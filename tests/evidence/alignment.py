"""Safe LoRA and SPLoRA on the bench's aligned models, whose unaligned twin the bench has."""

import json
import tempfile
from pathlib import Path
from typing import Any

import s3lora_serve
from s3lora_serve.alignment.make_reference import Options, make_reference
from s3lora_serve.policy.file import with_options
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import ScorerChoice, Strip
from s3lora_serve.policy.schema import Policy
from tests.evidence.adapters import Subject, make_adapter
from tests.evidence.attribution import spearman
from tests.evidence.base_model import Progress, aligned_base, unaligned_base
from tests.evidence.measuring import kept, load, measured
from tests.evidence.orders import scoring
from tests.evidence.stages import COUNTS, RESULTS, removed
from tests.evidence.wheels import CACHE

SCORERS = {"Safe LoRA": "safe-lora", "SPLoRA": "splora"}


def alignment_result(subject: Subject, progress: Progress) -> Any:
    """Both orders: captured energy, correlation with attribution, and points of base 0's curve.

    The modules first in Safe LoRA's order are also projected, as its paper does, not removed.
    """
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)

    def made() -> Any:
        policy = with_options(scoring(ScorerChoice()), "safe-lora", _reference(base))
        found: dict[str, Any] = {"orders": {}, "correlations": {}, "points": {}}
        harm = json.loads((RESULTS / f"attribution-{folder.name}.json").read_text())["modules"]
        for name, scorer in SCORERS.items():
            verdict = s3lora_serve.scan_adapter(folder, with_options(policy, scorer))
            score = {module.name: module.alignment or 0.0 for module in verdict.modules}
            found["orders"][name] = sorted(score, key=lambda each: (score[each], each))
            found["correlations"][name] = spearman(
                [-score[module["name"]] for module in harm], [module["harm"] for module in harm]
            )
            captured = sorted(module.captured or 0.0 for module in verdict.modules)
            found["captured"] = [captured[0], captured[len(captured) // 2]]
        if subject.base == 0:
            model, gated = load(base, folder)
            assert gated is not None
            for place, (name, order) in enumerate(found["orders"].items()):
                found["points"][name] = removed(model, gated, order)
                progress(f"{subject}: alignment scorers", place + 1, len(SCORERS) + 1)
            found["points"]["Safe LoRA projected"] = _projected(base, folder, policy)
            progress(f"{subject}: alignment scorers", len(SCORERS) + 1, len(SCORERS) + 1)
        return found

    return kept(RESULTS / f"alignment-{folder.name}.json", made)


def _reference(base: Path) -> Path:
    file = (CACHE / "references" / f"{base.name}.safetensors").absolute()
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        make_reference(unaligned_base(), base, file, Options(dtype="float32"))
    return file


def _projected(base: Path, folder: Path, policy: Policy) -> list[Any]:
    """Points with the first modules of Safe LoRA's order projected, as `s3lora strip` writes them.

    The default bound on the number of modules is lifted: the points are those of the other orders.
    """
    points = []
    for count in COUNTS:
        chosen = with_options(policy, action="project").model_copy(
            update={
                "strip": Strip(top_k=count),
                "limits": Limits(seconds=3600, max_stripped_fraction=1.0),
            }
        )
        with tempfile.TemporaryDirectory() as parent:
            target = Path(parent) / "projected"
            verdict = s3lora_serve.strip_adapter(folder, target, chosen)
            model, _ = load(base, target)
        share = sum(m.removed_share * (m.energy_share or 0.0) for m in verdict.modules)
        point = {"at": f"count {count}", "count": len(verdict.projected), "share": share}
        points.append({**point, **measured(model, few=True)})
    return points
