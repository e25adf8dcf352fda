"""How fast memory grows: least squares over means of minutes, with a bootstrap interval."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

from tests.runs.load.watch import Sample

SETTLING = 0.25
"""Share of the time in which memory settles; the slope is that of the rest."""

BLOCK = 60.0
"""Seconds whose samples are one point of the slope: shorter ones depend on each other."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Growth:
    """MB an hour, its 95 % interval (infinite if the time was too short to say), and the mean."""

    slope: float
    low: float
    high: float
    mean: float  # MB

    def __str__(self) -> str:
        return f"{self.slope:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    def scaled(self, factor: float) -> "Growth":
        """The growth at another pace."""
        return Growth(self.slope * factor, self.low * factor, self.high * factor, self.mean)

    def beyond(self, other: "Growth") -> "Growth":
        """What this grows more than another; the interval contains all pairs of the two."""
        return Growth(
            self.slope - other.slope, self.low - other.high, self.high - other.low, self.mean
        )


def growth(samples: Sequence[Sample]) -> Growth:
    """The growth over the settled part of the samples."""
    begin = samples[0].at + SETTLING * (samples[-1].at - samples[0].at)
    blocks: dict[int, list[float]] = {}
    for sample in samples:
        if sample.at >= begin:
            blocks.setdefault(int((sample.at - begin) / BLOCK), []).append(sample.megabytes)
    points = [(block * BLOCK / 3600, fmean(found)) for block, found in blocks.items()]
    mean = fmean(y for _, y in points)
    if len(points) < 3:
        return Growth(0.0, -math.inf, math.inf, mean)
    draw = random.Random(0)
    drawn = (draw.choices(points, k=len(points)) for _ in range(RESAMPLES))
    slopes = sorted(_slope(each) for each in drawn if len(set(each)) > 1)
    cut = int(0.025 * len(slopes))
    return Growth(_slope(points), slopes[cut], slopes[-1 - cut], mean)


def _slope(points: Sequence[tuple[float, float]]) -> float:
    return linear_regression(*zip(*points, strict=True)).slope
