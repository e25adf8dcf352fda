"""Cells and tables of the pages that the benches write."""

import json
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from tests.evidence.stages import RESULTS


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def read(pattern: str) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))}


def rate(rate: Any) -> str:
    return f"{rate['value']:.2f} ({rate['low']:.2f}–{rate['high']:.2f})"


def score(rates: Any) -> float:
    return float((1 - rates["ASR"]["value"]) * rates["skill"]["value"])


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{mean(values):.2f}"
    return f"{mean(values):.2f} ± {1.96 * stdev(values) / len(values) ** 0.5:.2f}"
