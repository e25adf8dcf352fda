"""Measurements: least times of routes that take turns, errors, and peak memory."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from s3lora_serve.spectral import Factors
from tests.runs.benchmarks import routes

Route = Callable[[Sequence[Factors]], object]


def least_seconds(
    modules: Sequence[Factors], timed: Sequence[Route], rounds: int
) -> dict[str, float]:
    """Least time of each route; the routes take turns, so noise affects all alike."""
    best = {route.__name__: float("inf") for route in timed}
    for _ in range(rounds):
        for route in timed:
            started = time.perf_counter()
            route(modules)
            best[route.__name__] = min(best[route.__name__], time.perf_counter() - started)
    return best


def largest_errors(exact: Sequence[float], sample: Sequence[Factors]) -> dict[str, float]:
    """Largest |SSI − exact| of the fast routes."""
    return {
        route.__name__: max(abs(a - b) for a, b in zip(route(sample), exact, strict=True))
        for route in (routes.ours, routes.per_module_float32)
    }


def peak_extra(modules: Sequence[Factors]) -> int:
    """Bytes by which scoring raises the peak memory of this process over the weights' memory.

    Drawing the weights in float32 raised the peak too, so it is reset before scoring.
    """
    routes.ours(modules[:7])  # initialises the libraries
    held = resident()
    routes.ours(modules)
    return peak() - held


def in_fresh_process(*arguments: str) -> int:
    """The number that `python -m tests.runs.benchmarks --memory …` prints."""
    command = [sys.executable, "-m", "tests.runs.benchmarks", "--memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def machine() -> dict[str, object]:
    """The machine on which the figures are measured."""
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


def resident() -> int:
    """Bytes of this process in memory now; the peak is counted from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of this process in memory since `resident`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
