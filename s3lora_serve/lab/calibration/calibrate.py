"""Calibration of one adapter: probes in, plan and frontier out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import Adapter, read_adapter
from s3lora_serve.lab.base_model.judge import check_aligned, is_refusal
from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.base_model.probes import Kind, ProbeFile, Split, split
from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
from s3lora_serve.lab.calibration.directions import examples_run
from s3lora_serve.lab.calibration.gate_families import By, Gates, first_gates
from s3lora_serve.lab.calibration.gates import GatedAdapter
from s3lora_serve.lab.calibration.kept_answers import harmful_beginnings, kept_answers
from s3lora_serve.lab.calibration.measure import Measuring
from s3lora_serve.lab.calibration.plan_of_gates import plan_of
from s3lora_serve.lab.calibration.progress import Progress, silent, summed
from s3lora_serve.lab.calibration.saved_search import SavedSearch, SearchFile
from s3lora_serve.lab.calibration.search import (
    REFUSAL_SLACK,
    ROUNDS,
    CalibrationSplit,
    Found,
    Goal,
    Material,
    Point,
    search,
)
from s3lora_serve.lab.tokens import JUDGED_TOKENS
from s3lora_serve.plans.schema import Measured, Plan
from s3lora_serve.policy.limits import Limits

REFUSAL_TOKENS = 6
"""Tokens of a refusal that the gates learn: later ones follow from them."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result: a plan, whether it reaches the goal, and the frontier."""

    plan: Plan
    reached: bool
    frontier: tuple[Point, ...]
    by_module: tuple[Point, ...]  # whole modules at equal removed norm, for comparison


def calibrate(
    base: CalibrationBase,
    folder: Path,
    files: Sequence[ProbeFile],
    options: CalibrationOptions,
    *,
    saved: SearchFile | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Learn what to remove from an adapter, so that it refuses what its base model refuses.

    Args:
        base: the base model, which may serve many calibrations.
        folder: the adapter's folder.
        files: probes; harmful and benign ones, and skill ones if there are any.
        options: what an operator can set.
        saved: the file that the search is saved in while it runs.
        progress: called as the work goes on.

    Raises:
        AdapterRejected: the adapter cannot be read, or does not fit the base model.
        BaseModelUnfit: the base model cannot be loaded.
        BaseUnaligned: the base model complies with most harmful probes.
    """
    adapter = read_adapter(copy_adapter(folder, Limits()), Limits())
    what = adapter.copy.digest, adapter.config.digest, [file.digest for file in files], options
    saved_search = SavedSearch(saved, repr(what)) if saved else None
    with base.with_adapter(adapter) as gated:
        found = _calibration(base, gated, adapter, files, options, saved_search, progress)
    if saved_search is not None:
        saved_search.remove()
    return found


def _calibration(
    base: CalibrationBase,
    gated: GatedAdapter,
    adapter: Adapter,
    files: Sequence[ProbeFile],
    options: CalibrationOptions,
    saved_search: SavedSearch | None,
    progress: Progress,
) -> Calibration:
    model = base.model
    parts = {file.kind: split(file.probes, options.seed) for file in files}
    beginnings = harmful_beginnings(model, gated, parts)
    material = _material(base, gated, parts, beginnings, options, progress)
    measuring = Measuring.of(model, gated, parts, beginnings, options.phrases, progress)
    base_refusal = _base_refusal(base, gated, measuring, "benign")
    gated.keep()
    whole = measuring("calibration", "whole adapter")
    before = measuring("held_out", "before, held out")
    limit = max(base_refusal, whole.benign_refusal.value) + REFUSAL_SLACK
    goal = Goal(options.max_asr, limit)
    if goal.is_met(whole):
        found = _nothing_removed(gated, whole)
    else:
        gates = _first_gates(model, gated, material, options.by, progress)
        found = search(
            model,
            gated,
            gates,
            material,
            CalibrationSplit(goal, whole, lambda: measuring("calibration", "check")),
            options=options.of_search,
            saved_search=saved_search,
            progress=lambda step, note: progress("search", step, ROUNDS * options.steps, note),
        )
    gated.set(found.gates)
    after = measuring("held_out", "after, held out")
    plan = plan_of(base.folder, adapter, gated, found, files, options, (before, after))
    best = found.point.measured
    # Nobody can ask more of a plan than that it restores the base model.
    reached = goal.is_met(best) or (
        best.asr.value <= 1 - _base_refusal(base, gated, measuring, "harmful")
    )
    return Calibration(plan, reached, found.frontier, found.by_module)


def _first_gates(
    model: LanguageModel, gated: GatedAdapter, material: Material, by: By, progress: Progress
) -> Gates:
    kept = material.skill, material.benign
    total = examples_run(material.refusals, *kept)
    done = partial(progress, "directions", total=total)
    return first_gates(by, model, gated, material.refusals, kept, summed(done))


def _base_refusal(
    base: CalibrationBase,
    gated: GatedAdapter,
    measuring: Measuring,
    kind: Literal["harmful", "benign"],
) -> float:
    """The share of a kind's prompts of the calibration split that the base model itself refuses."""
    prompts = getattr(measuring.encodings["calibration"], kind)
    done = partial(measuring.progress, "base model", total=len(prompts))
    texts = base.answers(gated, prompts, JUDGED_TOKENS, summed(done))
    return sum(is_refusal(text, measuring.phrases) for text in texts) / len(texts)


def _material(
    base: CalibrationBase,
    gated: GatedAdapter,
    parts: Mapping[Kind, Split],
    beginnings: tuple[str, ...],
    options: CalibrationOptions,
    progress: Progress,
) -> Material:
    """The search split with what the gates learn from: refusals, answers to keep, base answers."""
    model = base.model
    harmful = [model.prompt(probe.prompt) for probe in parts["harmful"].search]
    own = base.answers(gated, harmful, JUDGED_TOKENS)
    progress("base model's answers", 1, 2)
    refused = [is_refusal(text, options.phrases) for text in own]
    check_aligned(sum(refused), len(refused), "harmful probes of the search split")
    refusals = [
        (prompt, model.answer(text, end=False)[:REFUSAL_TOKENS])
        for place, (prompt, answer) in enumerate(zip(harmful, own, strict=True))
        if options.refusals or refused[place]
        for text in [
            options.refusals[place % len(options.refusals)] if options.refusals else answer
        ]
    ]
    found = kept_answers(model, gated, parts, "search", beginnings)
    # Without probes of skill, the benign prompts stand for the adapter's work, not the base's.
    benign = [model.prompt(probe.prompt) for probe in parts["benign"].search]
    asked = benign if "skill" in parts else found.others
    base_answers = base.answers(gated, asked, JUDGED_TOKENS)
    progress("base model's answers", 2, 2)
    return Material(
        refusals,
        found.kept,
        [
            (prompt, tokens)
            for prompt, text in zip(asked, base_answers, strict=True)
            if (tokens := model.answer(text, end=False))
        ],
        sorted({model.answer(text, end=False)[0] for text in options.compliance if text}),
    )


def _nothing_removed(gated: GatedAdapter, whole: Measured) -> Found:
    point = Point(0.0, 0.0, whole)
    gates = tuple(torch.eye(len(layer.S)) for layer in gated.layers)
    return Found(gates, point, (point,), (), 0)
