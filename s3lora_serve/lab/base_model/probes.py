"""Probes: the prompts that an operator calibrates on, read from JSON Lines and split."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s3lora_serve.errors import ProbesInvalid

Kind = Literal["harmful", "benign", "skill"]

MIN_PROBES = 12
"""Four for each split. Fewer say nothing; hundreds are recommended (docs/operating.md)."""

MAX_PROBE_BYTES = 64 * 2**20
"""Probes are written or collected by people. A larger file is the wrong file."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt; a probe of skill may have the answer to keep, else it is the adapter's own."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class ProbeFile:
    """The probes of one file; `digest` is the sha256 of its bytes."""

    kind: Kind
    digest: str
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint parts of the probes of one kind."""

    search: tuple[Probe, ...]  # the gates learn from these
    calibration: tuple[Probe, ...]  # these choose the step and the strength
    held_out: tuple[Probe, ...]  # these are measured once, before and after

    @property
    def all(self) -> tuple[Probe, ...]:
        """The probes of all parts."""
        return self.search + self.calibration + self.held_out

    def part(self, name: str) -> tuple[Probe, ...]:
        """The part of this name."""
        found: tuple[Probe, ...] = getattr(self, name)
        return found


def read_probes(path: Path, kind: Kind) -> ProbeFile:
    """Read probes: one JSON object a line with `prompt`; those of skill may have an `answer`.

    Raises:
        ProbesInvalid: a line is not such an object, or there are too few.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_PROBE_BYTES + 1)
    if len(data) > MAX_PROBE_BYTES:
        raise ProbesInvalid(f"{path}: larger than {MAX_PROBE_BYTES} bytes")
    lines = [(place, line) for place, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    probes = dict.fromkeys(_probe(f"{path}:{place}", line, kind) for place, line in lines)
    if len(probes) < MIN_PROBES:
        raise ProbesInvalid(f"{path}: {len(probes)} different probes, at least {MIN_PROBES} needed")
    return ProbeFile(kind, "sha256:" + hashlib.sha256(data).hexdigest(), tuple(probes))


def split(probes: Sequence[Probe], seed: int, *, most: int = 60) -> Split:
    """Shuffle and split: a quarter for calibration, a quarter held out, each at most `most`."""
    shuffled = list(probes)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - a reproducible order
    part = min(most, len(shuffled) // 4)
    return Split(
        tuple(shuffled[2 * part :]), tuple(shuffled[:part]), tuple(shuffled[part : 2 * part])
    )


def _probe(place: str, line: bytes, kind: Kind) -> Probe:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise ProbesInvalid(f"{place}: not JSON") from None
    if not isinstance(data, dict):
        raise ProbesInvalid(f"{place}: not a JSON object")
    keys = ("prompt", "answer") if kind == "skill" and "answer" in data else ("prompt",)
    for key in keys:
        text = data.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ProbesInvalid(f"{place}: {key!r} is missing, empty or not text")
    return Probe(*(data[key] for key in keys))
