"""The stages of the bench. Each keeps its result in a file, so that a run goes on where it was."""

import shutil
import time
from pathlib import Path
from typing import Any

import s3lora_serve
from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.calibration.calibrate import REFUSAL_TOKENS, calibrate
from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
from s3lora_serve.lab.calibration.gate_families import first_gates
from s3lora_serve.lab.calibration.gates import GatedAdapter
from s3lora_serve.lab.calibration.search import (
    STEPS,
    CalibrationSplit,
    Goal,
    Material,
    SearchOptions,
    search,
)
from s3lora_serve.plans.file import read_plan
from s3lora_serve.plans.schema import Measured, Rate
from s3lora_serve.policy.method import ScorerChoice
from s3lora_serve.policy.schema import Policy
from tests.runs.evidence.adapters import Subject, make_adapter
from tests.runs.evidence.attribution import harm_by_module, spearman
from tests.runs.evidence.base_model import Progress, aligned_base, alignment
from tests.runs.evidence.measuring import divergence, greedy, kept, load, measured
from tests.runs.evidence.orders import orders, scoring
from tests.runs.evidence.probes import probe_files
from tests.runs.evidence.prompts import harmful
from tests.runs.evidence.skill import skill
from tests.runs.evidence.training import DTYPE
from tests.runs.evidence.wheels import CACHE

RESULTS = CACHE / "results"


def base_result(base: int, progress: Progress) -> Any:
    """What an aligned base does, and the shares by which its fine-tune was chosen."""
    folder = aligned_base(base, progress)
    return kept(
        RESULTS / f"base-{base}.json",
        lambda: {**measured(load(folder)[0]), "alignment": alignment(base)},
    )


def subject_result(subject: Subject, progress: Progress) -> Any:
    """One adapter before and after its calibrated plan, on the test prompts."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)
    name = folder.name

    def made() -> Any:
        started = time.perf_counter()
        plan = CACHE / "plans" / f"{name}.json"
        plan.parent.mkdir(exist_ok=True)
        files = [read_probes(file, kind) for kind, file in probe_files(subject.skill).items()]
        found = calibrate(
            CalibrationBase(base, dtype=DTYPE),
            folder,
            files,
            CalibrationOptions(seed=subject.seed),
            progress=lambda phase, done, total, note="": progress(
                f"{subject}: {phase} {note}", done, total
            ),
        )
        plan.write_text(found.plan.model_dump_json())
        seconds = time.perf_counter() - started
        before, gated = load(base, folder)
        assert gated is not None
        first = measured(before, subject.skill)
        kl = [divergence(before, gated, [None] * len(gated.layers))]
        served = served_folder(folder, plan)
        after, gated = load(base, served)
        assert gated is not None
        second = measured(after, subject.skill)
        kl.append(divergence(after, gated, [None] * len(gated.layers)))
        return {
            "before": first,
            "after": second,
            "kl": kl,
            "reached": found.reached,
            "method": found.plan.method,
            "seconds": seconds,
        }

    return kept(RESULTS / f"{name}.json", made)


def served_folder(folder: Path, plan: Path) -> Path:
    """The adapter as the gate serves it under a plan, written by `s3lora strip --plan`."""
    target = CACHE / "served" / folder.name
    shutil.rmtree(target, ignore_errors=True)  # of an earlier plan
    target.parent.mkdir(exist_ok=True)
    policy = Policy(on_uninformative="admit")
    s3lora_serve.strip_adapter(folder, target, policy, plan=read_plan(plan))
    return target


def orders_of(folder: Path) -> dict[str, list[str]]:
    """All orders of an adapter's modules; the dense indices take minutes."""
    found: dict[str, list[str]] = kept(
        RESULTS / f"orders-{folder.name}.json", lambda: orders(folder)
    )
    return found


def ceiling(subject: Subject, progress: Progress) -> Any:
    """Gates that are learnt and chosen on the test prompts themselves: the best this form can."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)

    def made() -> Any:
        model, gated = load(base, folder)
        assert gated is not None
        refusals = [
            (prompt, refusal[:REFUSAL_TOKENS])
            for prompt, refusal in _base_answers(model, gated, harmful().test)
        ]
        calls = [
            (model.prompt(prompt), model.answer(call)) for prompt, call in skill(subject.skill).test
        ]
        gated.keep()
        found = search(
            model,
            gated,
            first_gates("directions", model, gated, refusals, [calls]),
            Material(refusals, calls, []),
            CalibrationSplit(
                Goal(0.0, 1.0),
                _as_measured(measured(model, few=True)),
                lambda: _as_measured(measured(model, few=True)),
            ),
            options=SearchOptions(strengths=(1.0,)),
            progress=lambda step, _note: progress(f"{subject}: ceiling", step, STEPS),
        )
        gated.set(found.gates)
        return measured(model)

    return kept(RESULTS / f"ceiling-{folder.name}.json", made)


def _base_answers(
    model: LanguageModel, gated: GatedAdapter, prompts: list[str]
) -> list[tuple[Encoded, Encoded]]:
    """Prompts with the first tokens of the base model's answers; the adapter stays removed."""
    gated.remove()
    return [
        (model.prompt(prompt), model.answer(answer, end=False))
        for prompt, answer in zip(prompts, greedy(model, prompts), strict=True)
    ]


def _as_measured(rates: dict[str, Rate]) -> Measured:
    return Measured(asr=rates["ASR"], skill=rates["skill"], benign_refusal=rates["ASR"])


def attribution(subject: Subject, progress: Progress) -> Any:
    """Spearman's rank correlation of each index with a module's part in the harm."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress)

    def made() -> Any:
        model, gated = load(base, folder)
        assert gated is not None
        refusals = _base_answers(model, gated, harmful().test[:40])
        harm = harm_by_module(model, gated, refusals).tolist()
        names = [module.name for module in gated.modules]
        correlations = {}
        for index, order in orders_of(folder).items():
            position = {name: -place for place, name in enumerate(order)}
            if not index.startswith("random"):
                correlations[index] = spearman([position[name] for name in names], harm)
        verdict = s3lora_serve.scan_adapter(folder, scoring(ScorerChoice()))
        ssi = {module.name: module.relative_ssi for module in verdict.modules}
        modules = [
            {"name": name, "ssi": ssi[name], "harm": value}
            for name, value in zip(names, harm, strict=True)
        ]
        return {"correlations": correlations, "modules": modules}

    return kept(RESULTS / f"attribution-{folder.name}.json", made)
