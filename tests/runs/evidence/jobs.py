"""What the bench does for each base, in a process of its own."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from tests.runs.evidence.adapters import Subject
from tests.runs.evidence.equal_skill import equal_skill
from tests.runs.evidence.repair import repair_result, repair_sweep
from tests.runs.evidence.served import served_result
from tests.runs.evidence.stages import attribution, base_result, ceiling, subject_result
from tests.runs.evidence.sweep import sweep_result

BASES, SEEDS = (0, 1), (0, 1, 2)

Job = Callable[[Callable[[str, int, int], None]], Any]


def subjects(seeds: int) -> list[Subject]:
    """All adapters of the bench, those first that the claims are about.

    20 % has every seed on every base; the other kinds have each seed on one base, in
    turn.
    """
    drawn = SEEDS[:seeds]
    found = [Subject("20 %", base, seed) for seed in drawn for base in BASES]
    kinds = ("benign", 0), ("harmful", 1), ("20 % text", 0), ("5 %", 1), ("20 % attention", 1)
    kinds += (("20 % against repair", 0),)
    for kind, first in kinds:
        found += [Subject(kind, (first + seed) % len(BASES), seed) for seed in drawn]
    return sorted(found, key=lambda subject: subject.seed)  # stable


def jobs(base: int, chosen: list[Subject]) -> list[Job]:
    """What is to be done for one base: repair, what is shown of one adapter, then all plans.

    A plan takes longest of what is done for each adapter.
    """
    shown = Subject("20 %", base, 0)
    here = [subject for subject in chosen if subject.base == base]
    found: list[Job] = [lambda progress: base_result(base, progress)]
    found += [
        lambda progress, subject=subject: repair_result(subject, progress) for subject in here
    ]
    stages = (subject_result, served_result, attribution, equal_skill, ceiling, sweep_result)
    found += [lambda progress, stage=stage: stage(shown, progress) for stage in stages]
    for subject in here:
        if subject.seed == SEEDS[0]:
            found.append(lambda progress, subject=subject: repair_sweep(subject, progress))
        found.append(lambda progress, subject=subject: subject_result(subject, progress))
    return found


def run(base: int, chosen: list[Subject], reports: Any) -> None:
    """Do one base's jobs in a process of its own; reports are (base, name, done, total)."""
    settle_in()
    todo = jobs(base, chosen)
    for place, job in enumerate(todo):
        job(lambda name, done, total: reports.put((base, name, done, total)))
        reports.put((base, "", place + 1, len(todo)))


def settle_in() -> None:
    """Set up a base's own process: its share of the cores, and no bars of libraries."""
    quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // len(BASES)))


def quiet() -> None:
    """The bars of the bench are enough."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
