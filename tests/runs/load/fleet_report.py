"""The figures of `make load-fleet`, a section of RESULTS.md."""

import math
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean

from tests.runs.benchmarks.measure import machine
from tests.runs.load.growth import Growth, growth
from tests.runs.load.report import replace_section
from tests.runs.load.traffic import Traffic
from tests.runs.load.watch import Watch
from tests.support.server import Server

TITLE = "# `make load-fleet`: an hour of a large fleet"

MAX_SHARE = 0.05
"""The gate's memory counts as flat if what it grows beyond stock vLLM's in an hour, at the upper
bound of its interval, is less than this share of it."""

MORE_SERIES = 0.01
"""Time series may be more by this share between quarters; a new one a policy would be 1.5 %."""

FEWEST = 12
"""Samples of their number that are compared: before, some refusal is seen for the first time."""


@dataclass
class Segment:
    """A part of the time on one server, and what was sampled."""

    name: str
    traffic: Traffic
    watch: Watch = field(init=False)
    thread: threading.Thread = field(init=False)

    @property
    def minutes(self) -> float:
        """How long it took."""
        samples = self.watch.samples
        return (samples[-1].at - samples[0].at) / 60

    @cached_property
    def growth(self) -> Growth:
        """How fast the server's private memory grows."""
        return growth(self.watch.samples)

    @property
    def served_a_minute(self) -> float:
        """Registrations after which an adapter was served."""
        return self.traffic.done["served"] / self.minutes


@dataclass
class GuardedSegment(Segment):
    """A half under the gate."""

    state: Path = field(kw_only=True)
    max_store: int = field(kw_only=True)
    noticed_after: float | None = None  # seconds from the worker's end to a failing probe
    store_bytes: list[int] = field(default_factory=list)
    series: list[int] = field(default_factory=list)
    refused_policies: int = 0
    policies: int = 0

    def sample(self, server: Server) -> None:
        """Note the store's size and the number of the gate's time series."""
        self.policies += 1
        copies = (each for each in self.state.glob("s3lora-*/[0-9a-f]*") if each.is_dir())
        self.store_bytes.append(sum(map(_bytes, copies)))
        metrics = server.metrics()
        self.series.append(sum(name.startswith("s3lora_") for name in metrics))
        self.refused_policies = int(metrics['s3lora_failures_total{reason="policy"}'])

    @property
    def quarters(self) -> tuple[float, float]:
        """Mean number of time series in the second and in the last quarter."""
        quarter = max(len(self.series) // 4, 1)
        return fmean(self.series[quarter : 2 * quarter] or self.series), fmean(
            self.series[-quarter:]
        )

    @property
    def problems(self) -> list[str]:
        """Failed requests and bounds that are passed."""
        found = list(self.traffic.problems)
        if max(self.store_bytes) > self.max_store:
            found.append(f"the store had {max(self.store_bytes)} bytes")
        early, late = self.quarters
        if len(self.series) >= FEWEST and late > (1 + MORE_SERIES) * early:
            found.append(f"time series grew from {early:.0f} to {late:.0f}")
        return found

    def beyond(self, stock: Segment) -> Growth:
        """How much more memory grows than stock vLLM's does for as many served adapters."""
        return self.growth.beyond(stock.growth.scaled(self.served_a_minute / stock.served_a_minute))


def growth_problems(segments: Sequence[GuardedSegment], stock: Segment) -> list[str]:
    """What is wrong with memory; the stock server's failed requests too."""
    found = [f"{stock.name}: {problem}" for problem in stock.traffic.problems]
    for segment in segments:
        beyond = segment.beyond(stock)
        if math.isfinite(beyond.high) and beyond.high > MAX_SHARE * beyond.mean:
            found.append(f"{segment.name}: memory grows by {beyond} MB an hour beyond stock vLLM's")
    return found


def _bytes(folder: Path) -> int:
    """Bytes of the files in a folder that the store may be deleting."""
    size = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += (Path(here) / name).stat().st_size
    return size


def write_report(segments: Sequence[GuardedSegment], stock: Segment, adapters: int) -> list[str]:
    """Print the figures, write them behind those of `make load`, and return the problems."""
    problems = [f"{each.name}: {problem}" for each in segments for problem in each.problems]
    problems += growth_problems(segments, stock)
    names = set().union(*(segment.traffic.registered for segment in segments))
    every = [*segments, stock]
    done = [segment.traffic.done for segment in every]
    rows: dict[str, list[object]] = {
        "minutes": [f"{segment.minutes:.0f}" for segment in every],
        "registrations": [each["loads"] for each in done],
        "answers and statuses checked": [each["checks"] for each in done],
        "requests to the base model": [each["base requests"] for each in done],
        "went wrong": [len(segment.traffic.problems) for segment in every],
        "cut off by the kill": [each["cut off"] for each in done],
        "policies, and registrations that found an invalid one": [
            *(f"{segment.policies}, {segment.refused_policies}" for segment in segments),
            "",
        ],
        "private memory, MB": [f"{segment.growth.mean:.0f}" for segment in every],
        "its slope, MB an hour": [segment.growth for segment in every],
        "beyond stock vLLM's": [*(segment.beyond(stock) for segment in segments), ""],
        "largest store, of its bound": [
            *(f"{max(segment.store_bytes) / segment.max_store:.0%}" for segment in segments),
            "",
        ],
        "the gate's time series, second quarter → last": [
            *("{:.0f} → {:.0f}".format(*segment.quarters) for segment in segments),
            "",
        ],
    }
    lines = [
        TITLE,
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['processor']}, {machine()['cores']} cores. The"
        f" same engine and checks, {adapters} distinct adapters of 8 to 28 modules and ranks 2 to"
        f" 8, of which {len(names)} were registered; one in five is hostile. Answers of the base"
        " model and of 38 adapters are compared with stock vLLM's. A new policy a minute, every"
        " fifth invalid. Then stock vLLM serves the good ones, from folders that stay as they are.",
        "",
        "| | " + " | ".join(segment.name for segment in every) + " |",
        "|---|" + "---:|" * len(every),
        *(f"| {label} | {' | '.join(map(str, values))} |" for label, values in rows.items()),
        "",
        "At half time the worker was killed (SIGKILL) under traffic: `/health` failed within"
        f" {segments[0].noticed_after or 0:.1f} s, and the server was started again on the same"
        " store. The slope is that of the last three quarters of a part, with its 95 % interval"
        " (bootstrap over minutes). Memory grows without the gate too: safetensors keeps 64 bytes"
        " for each tensor that vLLM reads, and vLLM some 0.5 kB for each answer. The gate's share"
        " is what lies beyond stock vLLM's slope, taken times the ratio of adapters served a"
        " minute.",
        *(f"- {problem}" for problem in problems[:40]),
    ]
    replace_section("\n".join(lines))
    return problems
