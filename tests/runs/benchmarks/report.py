"""The figures as a table, on the terminal and in RESULTS.md."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.runs.benchmarks import alignment_report, serving_report, sweep_report
from tests.runs.gpu import kernels

COLUMNS = (
    "adapter", "r", "dtype", "modules", "ours, s", "over floor", "naive f64 over ours",
    "per-module f32 over ours", "dense over ours", "QR over ours", "extra memory, MB",
    "max error of SSI", "error of per-module f32",
)  # fmt: skip

FOREWORD = """\
# Results

Written by `make bench` (`results.json` holds the figures). Ratios are of least times, the routes
taking turns in one run, so they can be compared across machines better than the seconds can.

- *Floor* is the irreducible work: two float32 Gram passes over B and A in cache-sized blocks.
- *Naive f64* stacks modules of one shape and converts them whole; *per-module f32* is what a plain
  loop does, and is not exact.
- *Dense* (the definition, float64 SVD of ΔW) is timed on the two smallest modules, *QR* on a layer.
- *Extra memory* is the peak of a fresh process over what holding the weights takes.
- The error is the largest against dense (two modules) and QR (two layers) in float64.
"""

AFTERWORD = """\
Where a spectrum falls off, float32 cannot hold the accuracy promised: those modules are computed
again in float64, and cost what the row with falling B shows. Ranks under 16 take float64 at once.

## Scaling

![Seconds against rank, width and number of modules](scaling.svg)
"""


def write(folder: Path) -> None:
    """Write RESULTS.md from the figures of every benchmark that was run."""
    from tests.runs.benchmarks import repair  # which imports this module

    sections = [markdown(json.loads((folder / "results.json").read_text()))]
    if (figures := folder / "kernels.json").exists():
        sections.append(kernels.section(json.loads(figures.read_text())))
    if (figures := folder / "alignment.json").exists():
        sections.append(alignment_report.alignment(json.loads(figures.read_text())))
    if (figures := folder / "repair.json").exists():
        sections.append(repair.section(json.loads(figures.read_text())))
    if (figures := folder / "admission.json").exists():
        sections.append(serving_report.admission(json.loads(figures.read_text())))
    if (figures := folder / "signing.json").exists():
        sections.append(serving_report.signing(json.loads(figures.read_text())))
    if (figures := folder / "serving.json").exists():
        sections.append(serving_report.inference(json.loads(figures.read_text())))
    if (figures := folder / "sweep.json").exists():
        sections.append(sweep_report.sweep(json.loads(figures.read_text())))
    (folder / "RESULTS.md").write_text("\n".join(sections))


def show(cases: list[dict]) -> None:  # type: ignore[type-arg]
    """Print one table."""
    table = Table(*COLUMNS)
    for case in cases:
        table.add_row(*_row(case))
    Console(width=200).print(table)


def markdown(data: dict) -> str:  # type: ignore[type-arg]
    """The first section of RESULTS.md."""
    machine = data["machine"]
    gpu = machine["gpu"] or "none"
    where = (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" torch {machine['torch']}, GPU: {gpu}."
    )
    table = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_row(case)) + " |" for case in data["cases"]),
    ]
    return "\n".join([FOREWORD, where, "", *table, "", AFTERWORD])


def _row(case: dict) -> tuple[str, ...]:  # type: ignore[type-arg]
    s, slow, errors = case["seconds"], case["sample_seconds"], case["errors"]
    falls = f", B falls {case['decades']:g} decades" if case["decades"] else ""
    return (
        f"{case['model']}, {case['projections']}{falls}", str(case["rank"]), case["dtype"],
        str(case["modules"]), f"{s['ours']:.3f}", f"{s['ours'] / s['floor']:.2f}",
        f"{s['naive_batched_float64'] / s['ours']:.2f}",
        f"{s['per_module_float32'] / s['ours']:.2f}", f"{slow['dense'] / slow['ours']:.0f}",
        f"{slow['qr'] / slow['ours_beside_qr']:.1f}", f"{case['extra_bytes'] / 2**20:.0f}",
        f"{errors['ours']:.1e}", f"{errors['per_module_float32']:.1e}",
    )  # fmt: skip
