"""Cells and tables of the pages that the benches write."""

import json
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from tests.runs.evidence import stages


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def read(pattern: str) -> dict[str, Any]:
    """The kept results whose names match, by the stems of their files."""
    files = sorted(stages.RESULTS.glob(pattern))
    return {file.stem: json.loads(file.read_text()) for file in files}


def kept_result(name: str) -> Any:
    """One kept result; None if its stage has not run."""
    file = stages.RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def rate(rate: Any) -> str:
    return f"{rate['value']:.2f} ({rate['low']:.2f}–{rate['high']:.2f})"


def score(rates: Any) -> float:
    return float((1 - rates["ASR"]["value"]) * rates["skill"]["value"])


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{mean(values):.2f}"
    return f"{mean(values):.2f} ± {1.96 * stdev(values) / len(values) ** 0.5:.2f}"
