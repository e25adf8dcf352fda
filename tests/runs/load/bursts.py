"""The burst phase of `make load`: 200 loads of a megabyte each at once, and its figures.

Stock vLLM gets the same loads, for comparison.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from tests.runs.benchmarks.measure import machine
from tests.runs.load.burst import BOUNDS, Burst, burst, p99, problems
from tests.runs.load.report import replace_section
from tests.runs.load.standstill import longest
from tests.support.adapters import train_adapter
from tests.support.server import OPEN_LOADING, Server

LOADS = 200
RANK = 32
"""28 modules of the tiny model in float32 at this rank have a megabyte."""

ROOM = ("--max-lora-rank", "32", "--max-cpu-loras", "8", "--disable-uvicorn-access-log")


def run_bursts(model: Path, root: Path) -> list[str]:
    """Run both bursts on a guarded server, one on a stock one, and write their figures.

    Returns the problems of the guarded server's.
    """
    folders = [train_adapter(model, root / f"burst-{i}", seed=i + 1, r=RANK) for i in range(2)]
    adapters = [(f"burst-{i}", folders[i % 2]) for i in range(LOADS)]
    store = root / "burst-state"
    environment = OPEN_LOADING | {"S3LORA_STATE_DIR": str(store)}
    with Server(model, root / "burst.log", ROOM, environment, one_process=False) as server:
        server.load("first", folders[0]).raise_for_status()  # workers are asked for the model once
        found = {
            "all wait": burst(server, adapters, store=store),
            "half leave": burst(server, adapters, leaving=0.5, store=store),
        }
    wrong = [f"{name}: {what}" for name, one in found.items() for what in problems(one, LOADS)]
    environment = OPEN_LOADING | {"VLLM_PLUGINS": ""}
    log = root / "burst-stock.log"
    with Server(model, log, ROOM, environment, guarded=False, one_process=False) as stock:
        found["stock vLLM"] = burst(stock, adapters, store=root / "none", settling=0)
    replace_section(_report(found, wrong))
    return wrong


def _report(found: dict[str, Burst], wrong: list[str]) -> str:
    bounds = ", ".join(f"{what} at most {bound:g}" for what, bound in BOUNDS.items())
    rows = {
        "served, turned away, left": lambda one: ", ".join(
            str(one.statuses[status]) for status in ("200", "429", "left")
        ),
        "seconds until all had ended": lambda one: f"{one.seconds:.1f}",
        "p99 between base-model tokens before and after, ms": lambda one: _ms(
            p99(one.gaps_without)
        ),
        "the same while adapters are loaded, ms": lambda one: _ms(p99(one.gaps)),
        "longest of them, ms": lambda one: _ms(longest(one.gaps)),
        "ratio of the p99s": lambda one: f"{p99(one.gaps) / p99(one.gaps_without):.2f}",
        "ratio without the gaps in which the machine stood still": lambda one: (
            f"{one.p99_ratio:.2f}"
        ),
        "slowest answer of /health, ms": lambda one: _ms(longest(one.health)),
        "standstills of the machine, s": lambda one: (
            f"{sum(end - start for start, end in one.standstills):.1f}"
        ),
        "longest standstill of the machine, ms": lambda one: _ms(longest(one.standstills)),
        "slowest answer of /health less standstills, ms": lambda one: _ms(one.slowest_health),
        "left a minute later": lambda one: ", ".join(
            f"{what} {early:g} → {late:g}" for what, (early, late) in one.left.items()
        ),
    }
    lines = [
        "# `make load`: bursts",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['processor']}, {os.cpu_count()} cores. {LOADS}"
        " loads of two adapters of a megabyte each at once, under distinct names, beside two"
        " streams of base-model requests. Half of the clients of the second burst leave within"
        f" five seconds. Bounds: {bounds}.",
        "",
        "| | " + " | ".join(found) + " |",
        "|---|" + "---:|" * len(found),
        *(
            f"| {row} | " + " | ".join(map(cell, found.values())) + " |"
            for row, cell in rows.items()
        ),
        "",
        *(f"- {problem}" for problem in wrong),
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
