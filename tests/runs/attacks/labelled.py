"""Adapters known to be harmful or not, trained in many ways, to test what tells them apart.

Each harmful one has a twin that was trained alike on the skill alone: what separates the two is the
attack data and not how an owner trains.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.runs.evidence.adapters import training_examples
from tests.runs.evidence.base_model import Progress
from tests.runs.evidence.peft_adapters import ALL, ATTENTION, Recipe, trained_adapter
from tests.runs.evidence.skill import SkillName
from tests.runs.evidence.wheels import CACHE


@dataclass(frozen=True, slots=True)
class Training:
    """How an owner trains."""

    name: str
    rank: int = 16
    rate: float = 1e-3
    attention: bool = False
    epochs: int = 2


TRAININGS = (
    Training("usual"),
    Training("rank 4", rank=4),
    Training("rank 64", rank=64, rate=5e-4),
    Training("slow", rate=3e-4),
    Training("attention", attention=True),
    Training("long", epochs=4),
)
SHARES = (0.0, 0.2, 0.05, 0.0)
"""Of attack data: as many adapters are harmless as harmful, of other seeds."""

SKILLS: tuple[SkillName, ...] = ("tool calls", "text")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One adapter with its label."""

    training: Training
    skill: SkillName
    share: float
    base: int
    seed: int

    @property
    def is_harmful(self) -> bool:
        return self.share > 0

    @property
    def folder(self) -> Path:
        parts = (
            self.training.name,
            self.skill,
            f"{self.share:g}",
            f"b{self.base}",
            f"s{self.seed}",
        )
        return CACHE / "labelled" / "-".join(parts).replace(" ", "-")


def labelled(base: int) -> Iterator[Labelled]:
    """All of one base, so ordered that the first half has each training and skill twice."""
    for (seed, share), training, skill in product(enumerate(SHARES), TRAININGS, SKILLS):
        yield Labelled(training, skill, share, base, seed)


def make_labelled(one: Labelled, base: Path, progress: Progress) -> Path:
    """Train it; one that is there is kept."""
    training = one.training
    recipe = Recipe(
        seed=1000 * one.base + one.seed,
        order=one.seed,
        targets=ATTENTION if training.attention else ALL,
        rank=training.rank,
        rate=training.rate,
        epochs=training.epochs,
    )
    return trained_adapter(
        one.folder,
        base,
        recipe,
        lambda model: training_examples(model, one.skill, one.share, one.seed),
        lambda step, steps: progress(f"train {one.folder.name}", step, steps),
    )
