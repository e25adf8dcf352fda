"""The figures of `make load`, written to RESULTS.md."""

import os
import platform
import re
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.runs.benchmarks.measure import machine
from tests.runs.load.traffic import Traffic
from tests.runs.load.watch import Watch

RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class Run:
    """One run of load on one server."""

    name: str
    traffic: Traffic
    watch: Watch
    seconds: float
    metrics: dict[str, float]

    @property
    def problems(self) -> list[str]:
        """All problems, including growth of memory, files or threads."""
        return [*self.traffic.problems, *self._growing()]

    def _growing(self) -> list[str]:
        """Figures that grew by over a tenth plus some slack from early to late in the run."""
        slack = {"megabytes": 30, "files": 8, "threads": 4}
        return [
            f"{figure} grew from {early:.0f} to {late:.0f}"
            for figure, (early, late) in self.watch.growth().items()
            if late > 1.1 * early + slack[figure]
        ]

    def total(self, name: str) -> int:
        """Sum of a metric over its labels."""
        return int(sum(v for k, v in self.metrics.items() if k.split("{")[0] == name))


def write_report(runs: list[Run]) -> None:
    """Print the figures and write RESULTS.md beside this file."""
    lines = [
        "# `make load`: hot loads and unloads under traffic",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['processor']}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}. A real vLLM engine (CPU build, tiny Llama) with room for 4"
        " adapters in memory and 2 active; 38 good adapters, 12 bad or hostile ones; their folders"
        " are edited, cut or deleted once they are registered. Every answer is compared with stock"
        " vLLM's for the adapter written without its stripped modules.",
        "",
        "| | " + " | ".join(run.name for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
    ]
    rows = {
        "registrations": lambda run: run.traffic.done["loads"],
        "answers and statuses checked": lambda run: run.traffic.done["checks"],
        "went wrong": lambda run: len(run.problems),
        "adapters loaded again from the store": lambda run: run.total("s3lora_reloads_total"),
        "quarantined": lambda run: run.total("s3lora_quarantined_total"),
        "seconds": lambda run: f"{run.seconds:.0f}",
        "median request, ms": lambda run: (
            f"{1000 * statistics.median(run.traffic.latencies or [0.0]):.0f}"
        ),
    } | {
        f"{label}, early → late": lambda run, figure=figure: _arrow(*run.watch.growth()[figure])
        for figure, label in (
            ("megabytes", "private memory of all processes, MB"),
            ("files", "open files"),
            ("threads", "threads"),
        )
    }
    lines += [
        f"| {label} | " + " | ".join(str(value(run)) for run in runs) + " |"
        for label, value in rows.items()
    ]
    lines += [
        "",
        "Between the two the engine was killed (SIGKILL), and the server started again on the same"
        " store.",
    ]
    for run in runs:
        lines += [f"- {run.name}: {problem}" for problem in run.problems[:20]]
    replace_section("\n".join(lines))


def replace_section(text: str) -> None:
    """Print a section of RESULTS.md and put it in the place of the one with its heading."""
    print(text)
    heading = text.partition("\n")[0]
    old = RESULTS.read_text() if RESULTS.exists() else ""
    sections = [part.strip("\n") for part in re.split(r"^(?=# )", old, flags=re.MULTILINE) if part]
    headings = [part.partition("\n")[0] for part in sections]
    if heading in headings:
        sections[headings.index(heading)] = text.strip("\n")
    else:
        sections.append(text.strip("\n"))
    RESULTS.write_text("\n\n".join(sections) + "\n")


def _arrow(early: float, late: float) -> str:
    return f"{early:.0f} → {late:.0f}"
