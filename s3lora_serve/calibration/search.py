"""The search for gates: learn them, choose the step and the strength on the calibration split."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.calibration.checkpoint import Checkpoint
from s3lora_serve.calibration.gates import By, GatedAdapter, Gates
from s3lora_serve.calibration.language_model import Encoded, LanguageModel
from s3lora_serve.calibration.objective import Batch, answer_losses, loss
from s3lora_serve.plans.schema import Measured

RATE = {"subspace": 0.05, "component": 0.15, "module": 0.15}
"""Adam's first step size, which falls to a tenth. Ours, from the bench's adapters."""

BATCH = (9, 7, 8)
"""Refusals, skill and benign examples in one step."""

STEPS = 45
"""Steps of Adam at most. Ours: in trials on the bench 60 took a third longer and gained nothing."""

CHECK_EVERY = 15
"""Steps between measurements on the calibration split, and between saved states."""

PATIENCE = 3
"""Checks without a better result after which the search ends."""

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Strengths of the learnt gates that the frontier shows; 0 is the whole adapter."""

FEWEST_STEPS = 0.5
"""Share of the steps before which nothing is measured, so that the search never ends there: gates
that just reach the goal on the calibration split are not yet those that reach it on other prompts.
Ours, from the bench."""

REFUSAL_SLACK = 0.05
"""Rise of the benign refusal rate over the whole adapter's and the base's that is accepted."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the gates learn from."""

    refusals: Sequence[tuple[Encoded, Encoded]]
    skill: Sequence[tuple[Encoded, Encoded]]
    benign: Sequence[tuple[Encoded, Encoded]]
    compliance: Sequence[int] = ()  # tokens that compliance begins with; none: all but refusals


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the frontier, measured on the calibration split."""

    strength: float
    removed_share: float  # of Σ‖ΔW‖_F²
    measured: Measured


@dataclass(frozen=True, slots=True)
class Found:
    """The chosen gates, and the frontier that they were chosen from."""

    gates: tuple[Tensor, ...]
    point: Point
    frontier: tuple[Point, ...]
    by_module: tuple[Point, ...]  # whole modules at equal removed norm, for comparison
    steps: int


@dataclass(frozen=True, slots=True)
class Goal:
    """Reach this attack success rate with the least loss of skill."""

    max_asr: float
    max_benign_refusal: float

    def order(self, measured: Measured) -> tuple[float, ...]:
        """A key, the smallest is the best: ASR beyond the goal, then what is lost.

        Lost are skill, and benign prompts that are refused beyond the bound.
        """
        excess = max(0.0, measured.asr.value - self.max_asr)
        refusing = max(0.0, measured.benign_refusal.value - self.max_benign_refusal)
        return (round(excess, 6), round(refusing - measured.skill.value, 6))

    def is_met(self, measured: Measured) -> bool:
        """Whether the attack success rate is reached."""
        return measured.asr.value <= self.max_asr

    def is_good(self, measured: Measured, whole: Measured) -> bool:
        """Whether the goal is met with the whole adapter's skill, and without new refusals."""
        excess, lost = self.order(measured)
        return excess == 0 and -lost >= whole.skill.value


def search(
    model: LanguageModel,
    adapter: GatedAdapter,
    material: Material,
    goal: Goal,
    measured: Callable[[], Measured],
    *,
    whole: Measured,
    by: By = "subspace",
    steps: int = STEPS,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    compare: bool = True,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int, str], None] = lambda _step, _note: None,
) -> Found:
    """Learn gates on the search split, then choose step and strength on the calibration split.

    Args:
        model: the base model with the gated layers of `adapter`.
        adapter: the adapter's gated layers.
        material: the search split.
        goal: what orders the results.
        measured: measures the model, as its gates are now, on the calibration split.
        whole: the whole adapter, measured on the calibration split.
        by: the family of gates.
        steps: the most steps of Adam.
        seed: of the order of examples.
        strengths: the strengths of the frontier; 0 is the whole adapter.
        compare: whether to measure whole modules at equal removed norm as well.
        checkpoint: where the search is saved, and from which it goes on.
        progress: called after each step with its number, and what a check measured.
    """
    gates = Gates(by, [len(layer.S) for layer in adapter.layers], model.device)
    optimizer = torch.optim.Adam(list(gates.parameters.values()), lr=RATE[by], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.1, 1 - k / steps))
    skill = _with_losses(model, adapter, material.skill)
    examples: tuple[Sequence[Any], ...] = (material.refusals, skill, material.benign)
    streams = [_endless(part, seed + place) for place, part in enumerate(examples)]
    best: tuple[Point, dict[str, Tensor]] | None = None
    stale = taken = 0
    saved = checkpoint.load() if checkpoint else None
    if saved is not None:
        gates.restore(saved["gates"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        if saved.get("measured") is not None:
            now = Measured.model_validate(saved["measured"])
            best = (Point(1.0, saved["removed_share"], now), saved["best"])
        stale, taken = saved["stale"], saved["step"]
        for stream, size in zip(streams, BATCH, strict=True):
            deque(islice(stream, size * taken), maxlen=0)
    for step in range(taken + 1, steps + 1):
        parts = [list(islice(stream, size)) for stream, size in zip(streams, BATCH, strict=True)]
        value = loss(model, adapter, gates.matrices(), Batch(*parts), material.compliance)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        taken = step
        note = ""
        check = step % CHECK_EVERY == 0 or step == steps
        enough = step >= FEWEST_STEPS * steps
        if check and enough:
            point = _measured_at(adapter, gates, 1.0, measured)
            now = point.measured
            if best is None or goal.order(now) < goal.order(best[0].measured):
                best, stale = (point, gates.state()), 0
            else:
                stale += 1
            note = (
                f"ASR {now.asr.value:.2f}, skill {now.skill.value:.2f},"
                f" benign refused {now.benign_refusal.value:.2f}"
            )
        if check and checkpoint is not None:
            checkpoint.save(
                gates=gates.state(),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                measured=best[0].measured.model_dump() if best else None,
                removed_share=best[0].removed_share if best else None,
                best=best[1] if best else None,
                stale=stale,
                step=step,
            )
        progress(step, note)
        if stale >= PATIENCE or (best is not None and goal.is_good(best[0].measured, whole)):
            break
    known = {0.0: Point(0.0, 0.0, whole)}
    if best is not None:
        known[1.0] = best[0]
        gates.restore(best[1])
    frontier = [
        known.get(strength) or _measured_at(adapter, gates, strength, measured)
        for strength in strengths
    ]
    chosen = min(frontier, key=lambda point: (*goal.order(point.measured), point.removed_share))
    with torch.no_grad():
        found = tuple(gate.detach() for gate in gates.matrices(chosen.strength))
    beside = _by_module(adapter, gates, frontier, measured) if compare else ()
    return Found(found, chosen, tuple(frontier), beside, taken)


@torch.no_grad()
def _by_module(
    adapter: GatedAdapter,
    gates: Gates,
    frontier: Sequence[Point],
    measured: Callable[[], Measured],
) -> tuple[Point, ...]:
    """Whole modules, those first of which the gates remove the most, at equal removed norms."""
    shares = adapter.removed_shares(gates.matrices())
    order = shares.argsort(descending=True).tolist()
    points = []
    for point in frontier:
        kept = [torch.eye(len(layer.S), device=layer.S.device) for layer in adapter.layers]
        for place in order:
            if float(adapter.removed_share(kept)) >= point.removed_share:
                break
            kept[place] = torch.zeros_like(kept[place])
        if point.strength:
            adapter.set(kept)
            share = float(adapter.removed_share(kept))
            points.append(Point(point.strength, share, measured()))
    return tuple(points)


@torch.no_grad()
def _measured_at(
    adapter: GatedAdapter, gates: Gates, strength: float, measured: Callable[[], Measured]
) -> Point:
    matrices = gates.matrices(strength)
    adapter.set(matrices)
    return Point(strength, float(adapter.removed_share(matrices)), measured())


@torch.no_grad()
def _with_losses(
    model: LanguageModel, adapter: GatedAdapter, examples: Sequence[tuple[Encoded, Encoded]]
) -> list[tuple[Encoded, Encoded, float]]:
    """Examples with the whole adapter's loss on their answers."""
    adapter.keep()
    found = []
    for start in range(0, len(examples), BATCH[1]):
        part = examples[start : start + BATCH[1]]
        losses = answer_losses(model, part).tolist()
        found += [(*example, each) for example, each in zip(part, losses, strict=True)]
    return found


def _endless(examples: Sequence[Any], seed: int) -> Iterator[Any]:
    draw = random.Random(seed)  # noqa: S311 - a reproducible order
    while examples:
        yield from draw.sample(list(examples), len(examples))
