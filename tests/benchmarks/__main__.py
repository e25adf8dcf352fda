"""`make bench`: score adapters of several shapes by several routes, and write RESULTS.md."""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from s3lora_serve.spectral import Factors
from tests.benchmarks import routes, shapes

HERE = Path(__file__).parent
SAMPLE = 4  # modules of the largest routes: dense SVD takes seconds each
CASES = [
    # model, rank, dtype, attention only, decades that B falls off
    ("Llama-3.2-1B", 16, "bfloat16", False, 0.0),
    ("Llama-3-8B", 8, "bfloat16", False, 0.0),
    ("Llama-3-8B", 16, "bfloat16", True, 0.0),
    ("Llama-3-8B", 16, "bfloat16", False, 0.0),
    ("Llama-3-8B", 16, "float16", False, 0.0),
    ("Llama-3-8B", 16, "float32", False, 0.0),
    ("Llama-3-8B", 16, "bfloat16", False, 2.0),
    ("Llama-3-8B", 64, "bfloat16", False, 0.0),
]


def main() -> None:
    """Run the cases, print the table, write the data and RESULTS.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9, help="each figure is the least of these")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "RANK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(_peak_extra(arguments.memory[0], int(arguments.memory[1])))
        return
    results = [_measure(*case, arguments.rounds) for case in CASES]
    memory = [_in_fresh_process(*case) for case in (("Llama-3-8B", "16"), ("Llama-3-70B", "64"))]
    data = {"machine": _machine(), "cases": results, "memory": memory}
    (HERE / "results.json").write_text(json.dumps(data, indent=2) + "\n")
    (HERE / "RESULTS.md").write_text(_markdown(data))
    _print(results)


def _measure(model, rank, dtype, attention, decades, rounds):  # type: ignore[no-untyped-def]
    projections = shapes.ATTENTION if attention else None
    modules = shapes.adapter(model, rank, getattr(torch, dtype), projections, decades)
    times = _least(
        modules,
        (routes.floor, routes.ours, routes.naive_batched_float64, routes.per_module_float32),
        rounds if rank < 64 else max(3, rounds // 3),
    )
    sample = [m for m in modules if m.B.shape[0] * m.A.shape[1] <= 4096 * 4096][:SAMPLE]
    slow = _least(sample, (routes.ours, routes.qr, routes.dense), 1)
    exact = routes.dense(sample)
    found = {route: getattr(routes, route)(sample) for route in ("ours", "per_module_float32")}
    errors = {
        route: max(abs(a - b) for a, b in zip(values, exact, strict=True))
        for route, values in found.items()
    }
    return {
        "model": model, "rank": rank, "dtype": dtype, "decades": decades,
        "projections": "attention" if attention else "all", "modules": len(modules),
        "parameters": sum(m.A.numel() + m.B.numel() for m in modules),
        "seconds": times, "sample_seconds": slow, "sample": len(sample), "errors": errors,
    }  # fmt: skip


def _least(
    modules: Sequence[Factors], timed: Sequence[Callable[..., object]], rounds: int
) -> dict[str, float]:
    """Least time of each route, the routes taking turns so that all meet the same noise."""
    best = {route.__name__: float("inf") for route in timed}
    for _ in range(rounds):
        for route in timed:
            started = time.perf_counter()
            route(modules)
            best[route.__name__] = min(best[route.__name__], time.perf_counter() - started)
    return best


def _peak_extra(model: str, rank: int) -> int:
    """Bytes by which scoring raises the peak of this process over what holding the weights takes.

    The weights are drawn in float32 and thrown away, so the peak before scoring is reset first.
    """
    modules = shapes.adapter(model, rank, torch.bfloat16)
    routes.ours(modules[:7])  # libraries set themselves up
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS")
    routes.ours(modules)
    return _status("VmHWM") - held


def _status(field: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _in_fresh_process(model: str, rank: str) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.benchmarks", "--memory", model, rank]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"model": model, "rank": int(rank), "extra_bytes": int(done.stdout.split()[-1])}


def _machine() -> dict[str, object]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


HEADINGS = ("adapter", "r", "dtype", "modules", "ours, s", "over floor", "naive f64 over ours",
            "per-module f32 over ours", "dense over ours", "QR over ours", "max error of SSI",
            "error of per-module f32")  # fmt: skip


def _row(case: dict) -> tuple[str, ...]:  # type: ignore[type-arg]
    s, slow, errors = case["seconds"], case["sample_seconds"], case["errors"]
    falls = f", B falls {case['decades']:g} decades" if case["decades"] else ""
    return (
        f"{case['model']}, {case['projections']}{falls}", str(case["rank"]), case["dtype"],
        str(case["modules"]), f"{s['ours']:.3f}", f"{s['ours'] / s['floor']:.2f}",
        f"{s['naive_batched_float64'] / s['ours']:.2f}",
        f"{s['per_module_float32'] / s['ours']:.2f}", f"{slow['dense'] / slow['ours']:.0f}",
        f"{slow['qr'] / slow['ours']:.1f}", f"{errors['ours']:.1e}",
        f"{errors['per_module_float32']:.1e}",
    )  # fmt: skip


def _print(results: list[dict]) -> None:  # type: ignore[type-arg]
    table = Table(*HEADINGS)
    for case in results:
        table.add_row(*_row(case))
    Console(width=180).print(table)


def _markdown(data: dict) -> str:  # type: ignore[type-arg]
    machine, memory = data["machine"], data["memory"]
    lines = [
        "# Results",
        "",
        "Written by `make bench` (`results.json` holds the figures). Ratios are of least times,",
        "the routes taking turns in one run. *Floor* is the irreducible work: two float32 Gram",
        "passes over B and A in cache-sized blocks. Dense and QR are timed on a sample of modules.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" torch {machine['torch']}, GPU: {machine['gpu'] or 'none'}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(_row(case)) + " |" for case in data["cases"]),
        "",
        "Peak memory over holding the weights: "
        + ", ".join(
            f"{m['model']} r = {m['rank']}: {m['extra_bytes'] / 2**20:.0f} MB" for m in memory
        )
        + ".",
        "",
        "The CUDA path is unmeasured: no machine with a GPU ran it.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
