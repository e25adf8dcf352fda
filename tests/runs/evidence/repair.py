"""Repair at admission: what adapters do once they are repaired."""

import shutil
from pathlib import Path
from typing import Any

import s3lora_serve
from s3lora_serve.policy.method import RepairChoice, Strip
from s3lora_serve.policy.schema import Policy
from tests.runs.evidence.adapters import Subject, make_adapter
from tests.runs.evidence.base_model import Progress, aligned_base
from tests.runs.evidence.base_statistics import statistics
from tests.runs.evidence.measuring import kept, load, measured
from tests.runs.evidence.stages import RESULTS
from tests.runs.evidence.wheels import CACHE

EFFECTS = (0.001, 0.002, 0.003, 0.005)
"""`max_effect` of the sweep that the default comes from."""


def repair_result(subject: Subject, progress: Progress) -> Any:
    """One adapter under statistics with requests of its skill and without any."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)
    found = {}
    for place, (setting, without) in enumerate((("with", None), ("without", subject.skill))):
        file = statistics(base, without, progress)
        result = RESULTS / "repair" / f"{folder.name}-{setting}.json"
        found[setting] = kept(result, lambda file=file: _repaired(base, subject, file))
        progress(f"{subject}: repair", place + 1, 2)
    return found


def repair_sweep(subject: Subject, progress: Progress) -> Any:
    """One adapter at each `max_effect`, under statistics with requests of its skill."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)
    file = statistics(base, None, progress)
    found = {}
    for place, most in enumerate(EFFECTS):
        result = RESULTS / "repair-sweep" / f"{folder.name}-{most:g}.json"
        found[most] = kept(
            result, lambda most=most: _repaired(base, subject, file, max_effect=most, few=True)
        )
        progress(f"{subject}: sweep", place + 1, len(EFFECTS))
    return found


def policy(file: Path, **choice: Any) -> Policy:
    """A policy that repairs with statistics, and does nothing else."""
    return Policy(
        strip=Strip(top_k=0),
        on_uninformative="admit",
        repair=RepairChoice(statistics=file, **choice),
    )


def _repaired(
    base: Path, subject: Subject, file: Path, *, few: bool = False, **choice: Any
) -> dict[str, Any]:
    """Rates of the adapter as `s3lora strip --repair` writes it, and what its verdict says."""
    target = CACHE / "repaired" / f"{subject.folder.name}-{file.stem}"
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    verdict = s3lora_serve.strip_adapter(subject.folder, target, policy(file, **choice))
    facts = verdict.repair
    if facts is None:
        raise RuntimeError(f"{subject} was not repaired: {verdict.reason}")
    model, _ = load(base, target)
    said = {"lambda": facts.strength, "effect": facts.effect, "kept": facts.kept}
    return {**measured(model, subject.skill, few=few), "said": said}
