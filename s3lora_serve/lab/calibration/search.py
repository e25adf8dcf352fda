"""The search for gates: learn them, choose the step and the strength on the calibration split."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.calibration.gate_families import RATE, By, Gates
from s3lora_serve.lab.calibration.gates import GatedAdapter
from s3lora_serve.lab.calibration.objective import StepBatch, all_answer_losses, loss
from s3lora_serve.lab.calibration.saved_search import SavedSearch
from s3lora_serve.plans.defaults import STEPS
from s3lora_serve.plans.schema import Measured

BATCH = (9, 7, 8)
"""Refusals, skill and benign examples in one step."""

CHECK_EVERY = 8
"""Steps between measurements on the calibration split, and between saved states."""

PATIENCE = 3
"""Checks without a better result after which the search ends."""

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
"""Strengths of the learnt gates that the frontier shows; 0 is the whole adapter. Those beside 0 and
1 are measured where gates as learnt miss the goal, or to compare."""

ROUNDS = 3
"""Rounds of steps at most: the rate falls in each and begins anew in the next, which is made only
where the goal is not met. Ours: adapters on attention alone take two."""

FEWEST_STEPS = 0.5
"""Share of the first round before which nothing is measured, so that the search never ends there:
gates that just reach the goal on the calibration split are not yet those that reach it on other
prompts. Ours, from the bench."""

ENOUGH = 0.02
"""Skill that may be lost where the search ends early: one of 60 answers. Ours."""

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
        """Whether the goal is met with nearly the whole adapter's skill, and no new refusals."""
        excess, lost = self.order(measured)
        return excess == 0 and -lost >= whole.skill.value - ENOUGH


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How gates are searched for."""

    by: By = "directions"
    steps: int = STEPS  # of Adam, in one round
    seed: int = 0  # of the order of examples
    strengths: Sequence[float] = STRENGTHS  # of the frontier; 0 is the whole adapter
    compare: bool = False  # whether to measure whole modules at equal removed norm as well


Step = Callable[[int, str], None]
"""Called after each step with its number, and what a check measured."""


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """What is measured on the calibration split, and what is to be reached there."""

    goal: Goal
    whole: Measured  # the whole adapter
    measured: Callable[[], Measured]  # measures the model, as its gates are now


def search(
    model: LanguageModel,
    adapter: GatedAdapter,
    gates: Gates,
    material: Material,
    split: CalibrationSplit,
    *,
    options: SearchOptions,
    saved_search: SavedSearch | None = None,
    progress: Step = lambda _step, _note: None,
) -> Found:
    """Learn gates on the search split, then choose step and strength on the calibration split.

    Args:
        model: the base model with the gated layers of `adapter`.
        adapter: the adapter's gated layers.
        gates: as they are before the first step.
        material: the search split.
        split: measures on the calibration split, and the goal that orders the results.
        options: how gates are searched for.
        saved_search: where the search is saved, and from which it goes on.
        progress: called after each step.
    """
    found = _Search(model, adapter, gates, split.goal, split.measured, options)
    found.learn(material, split.whole, saved_search, progress)
    frontier = found.frontier(split.whole)
    chosen = min(
        frontier, key=lambda point: (*split.goal.order(point.measured), point.removed_share)
    )
    with torch.no_grad():
        matrices = tuple(gate.detach() for gate in found.gates.matrices(chosen.strength))
    compared = options.compare
    beside = _by_module(adapter, found.gates, frontier, split.measured) if compared else ()
    return Found(matrices, chosen, tuple(frontier), beside, found.taken)


class _Search:
    """Gates that are learnt step by step, and the best of them so far."""

    def __init__(
        self,
        model: LanguageModel,
        adapter: GatedAdapter,
        gates: Gates,
        goal: Goal,
        measured: Callable[[], Measured],
        options: SearchOptions,
    ) -> None:
        self._model, self._adapter, self._goal = model, adapter, goal
        self._measured, self._options = measured, options
        self.gates, steps = gates, options.steps
        parameters = list(gates.parameters.values())
        self._optimizer = torch.optim.Adam(parameters, lr=RATE[options.by], betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda k: max(0.1, 1 - (k % steps) / steps)
        )
        self._best: tuple[Point, dict[str, Tensor]] | None = None
        self._stale = 0  # checks since the best one
        self.taken = 0  # steps

    def learn(
        self,
        material: Material,
        whole: Measured,
        saved_search: SavedSearch | None,
        progress: Step,
    ) -> None:
        """Take steps until one is good, none gets better, or the goal is met after a round."""
        steps = self._options.steps
        streams = self._streams(material)
        if saved_search is not None and (saved := saved_search.load()) is not None:
            self._restore(saved)
            for stream, size in zip(streams, BATCH, strict=True):
                deque(islice(stream, size * self.taken), maxlen=0)
        for step in range(self.taken + 1, ROUNDS * steps + 1):
            parts = [list(islice(each, size)) for each, size in zip(streams, BATCH, strict=True)]
            self._step(StepBatch(*parts), material.compliance)
            self.taken = step
            ends_round = step % steps == 0
            check, note = step % CHECK_EVERY == 0 or ends_round, ""
            if check and step >= FEWEST_STEPS * steps:
                note = self._check()
            if check and saved_search is not None:
                saved_search.save(**self._state())
            progress(step, note)
            if self._stale >= PATIENCE or self._is_enough(whole, ends_round=ends_round):
                break

    def _is_enough(self, whole: Measured, *, ends_round: bool) -> bool:
        if self._best is None:
            return False
        best = self._best[0].measured
        return self._goal.is_good(best, whole) or (ends_round and self._goal.is_met(best))

    def frontier(self, whole: Measured) -> list[Point]:
        """The best gates at each strength, measured."""
        known = {0.0: Point(0.0, 0.0, whole)}
        if self._best is not None:
            known[1.0] = self._best[0]
            self.gates.restore(self._best[1])
        met = self._best is not None and self._goal.is_met(self._best[0].measured)
        shown = set(known) if met and not self._options.compare else set(self._options.strengths)
        return [
            known.get(strength) or _measured_at(self._adapter, self.gates, strength, self._measured)
            for strength in sorted(shown & set(self._options.strengths))
        ]

    def _streams(self, material: Material) -> list[Iterator[Any]]:
        skill = _with_losses(self._model, self._adapter, material.skill)
        examples: tuple[Sequence[Any], ...] = (material.refusals, skill, material.benign)
        return [_endless(part, self._options.seed + place) for place, part in enumerate(examples)]

    def _step(self, batch: StepBatch, compliance: Sequence[int]) -> None:
        value = loss(self._model, self._adapter, self.gates.matrices(), batch, compliance)
        self._optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()

    def _check(self) -> str:
        """Measure the gates as they are, and keep them if they are the best."""
        point = _measured_at(self._adapter, self.gates, 1.0, self._measured)
        now, order = point.measured, self._goal.order
        if self._best is None or order(now) < order(self._best[0].measured):
            self._best, self._stale = (point, self.gates.state()), 0
        else:
            self._stale += 1
        return (
            f"ASR {now.asr.value:.2f}, skill {now.skill.value:.2f},"
            f" benign refused {now.benign_refusal.value:.2f}"
        )

    def _state(self) -> dict[str, Any]:
        point, gates = self._best or (None, None)
        return {
            "gates": self.gates.state(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "measured": point.measured.model_dump() if point else None,
            "removed_share": point.removed_share if point else None,
            "best": gates,
            "stale": self._stale,
            "step": self.taken,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self.gates.restore(saved["gates"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        if saved.get("measured") is not None:
            now = Measured.model_validate(saved["measured"])
            self._best = (Point(1.0, saved["removed_share"], now), saved["best"])
        self._stale, self.taken = saved["stale"], saved["step"]


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


def _with_losses(
    model: LanguageModel, adapter: GatedAdapter, examples: Sequence[tuple[Encoded, Encoded]]
) -> list[tuple[Encoded, Encoded, float]]:
    """Examples with the whole adapter's loss on their answers."""
    adapter.keep()
    rows = zip(examples, all_answer_losses(model, examples), strict=True)
    return [(*example, each) for example, each in rows]


def _endless(examples: Sequence[Any], seed: int) -> Iterator[Any]:
    draw = random.Random(seed)  # noqa: S311 - a reproducible order
    while examples:
        yield from draw.sample(list(examples), len(examples))
