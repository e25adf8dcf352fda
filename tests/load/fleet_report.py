"""The figures of `make load-fleet`, appended to RESULTS.md."""

import math
import os
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, linear_regression

from tests.benchmarks.measure import machine
from tests.load.report import RESULTS
from tests.load.traffic import Traffic
from tests.load.watch import Watch
from tests.support.server import Server

TITLE = "# `make load-fleet`: an hour of a large fleet"
SETTLING = 0.25
"""Share of a half in which memory settles; the slope is that of the rest."""

BLOCK = 60.0
"""Seconds whose samples are one point of the slope: shorter ones depend on each other."""

RESAMPLES = 2000

MAX_SHARE = 0.05
"""Memory counts as flat if an hour at the slope's upper bound adds less than this share of it."""


@dataclass
class Segment:
    """Half of the time on one server, and what was sampled."""

    name: str
    traffic: Traffic
    state: Path
    max_store: int
    noticed_after: float | None = None  # seconds from the worker's end to a failing probe
    watch: Watch = field(init=False)
    thread: threading.Thread = field(init=False)
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

    def finish(self, server: Server) -> None:
        """Check that the engine lives."""
        if server.get("/health").status_code != 200:
            self.traffic.problems.append("the engine is dead")

    @property
    def problems(self) -> list[str]:
        """All problems, memory that grows and bounds that are passed among them."""
        found = list(self.traffic.problems)
        slope, low, high, mean = self.slope()
        if math.isfinite(high) and high > MAX_SHARE * mean:  # inf: too short to say
            found.append(f"memory grows by {slope:.1f} ({low:.1f} to {high:.1f}) MB an hour")
        if max(self.store_bytes) > self.max_store:
            found.append(f"the store had {max(self.store_bytes)} bytes")
        settled = self.series[len(self.series) // 2 :]
        if settled and max(settled) > 1.01 * settled[0]:
            found.append(f"time series grew from {settled[0]} to {max(settled)}")
        return found

    def slope(self) -> tuple[float, float, float, float]:
        """MB an hour by least squares over means of minutes, its 95 % interval, and the mean.

        The interval is that of a bootstrap over the minutes.
        """
        samples = self.watch.samples
        begin = samples[0].at + SETTLING * (samples[-1].at - samples[0].at)
        blocks: dict[int, list[float]] = {}
        for sample in samples:
            if sample.at >= begin:
                blocks.setdefault(int((sample.at - begin) / BLOCK), []).append(sample.megabytes)
        points = [(block * BLOCK / 3600, fmean(found)) for block, found in blocks.items()]
        mean = fmean(y for _, y in points)
        if len(points) < 3:
            return 0.0, -math.inf, math.inf, mean
        draw = random.Random(0)
        drawn = (draw.choices(points, k=len(points)) for _ in range(RESAMPLES))
        slopes = sorted(_slope(each) for each in drawn if len(set(each)) > 1)
        cut = int(0.025 * len(slopes))
        return _slope(points), slopes[cut], slopes[-1 - cut], mean


def _bytes(folder: Path) -> int:
    """Bytes of the files in a folder that the store may be deleting."""
    size = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += (Path(here) / name).stat().st_size
    return size


def _slope(points: Sequence[tuple[float, float]]) -> float:
    return linear_regression(*zip(*points, strict=True)).slope


def write_report(segments: Sequence[Segment], adapters: int) -> None:
    """Print the figures and write them behind those of `make load`."""
    names = set().union(*(segment.traffic.registered for segment in segments))
    rows: dict[str, list[str]] = {}

    def row(label: str, values: list[object]) -> None:
        rows[label] = [str(value) for value in values]

    done = [segment.traffic.done for segment in segments]
    row("minutes", [f"{_minutes(segment):.0f}" for segment in segments])
    row("registrations", [each["loads"] for each in done])
    row("answers and statuses checked", [each["checks"] for each in done])
    row("requests to the base model", [each["base requests"] for each in done])
    row("went wrong", [len(segment.problems) for segment in segments])
    row("cut off by the kill", [each["cut off"] for each in done])
    row("policies, and registrations that found an invalid one", [
        f"{segment.policies}, {segment.refused_policies}" for segment in segments
    ])  # fmt: skip
    row("private memory, MB", [f"{segment.slope()[3]:.0f}" for segment in segments])
    row("its slope, MB an hour, with the 95 % interval", [
        "{:+.1f} ({:+.1f} to {:+.1f})".format(*segment.slope()[:3]) for segment in segments
    ])  # fmt: skip
    row("largest store, of its bound", [
        f"{max(segment.store_bytes) / segment.max_store:.0%}" for segment in segments
    ])  # fmt: skip
    row("the gate's time series, half time → end", [
        f"{segment.series[len(segment.series) // 2]} → {segment.series[-1]}" for segment in segments
    ])  # fmt: skip
    lines = [
        TITLE,
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['processor']}, {machine()['cores']} cores. The"
        f" same engine and checks, {adapters} distinct adapters of 8 to 28 modules and ranks 2 to"
        f" 8, of which {len(names)} were registered; one in five is hostile. Answers of the base"
        " model and of 38 adapters are compared with stock vLLM's. A new policy a minute, every"
        " fifth invalid.",
        "",
        "| | " + " | ".join(segment.name for segment in segments) + " |",
        "|---|" + "---:|" * len(segments),
        *(f"| {label} | {' | '.join(values)} |" for label, values in rows.items()),
        "",
        "At half time the worker was killed (SIGKILL) under traffic: `/health` failed within"
        f" {segments[0].noticed_after or 0:.0f} s, and the server was started again on the same"
        " store. The slope is that of the last three quarters of each half.",
    ]
    for segment in segments:
        lines += [f"- {segment.name}: {problem}" for problem in segment.problems[:20]]
    text = "\n".join(lines) + "\n"
    before = RESULTS.read_text().partition(TITLE)[0].rstrip()
    RESULTS.write_text(f"{before}\n\n{text}")
    print(text)


def _minutes(segment: Segment) -> float:
    samples = segment.watch.samples
    return (samples[-1].at - samples[0].at) / 60
