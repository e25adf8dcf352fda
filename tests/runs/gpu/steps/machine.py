"""Step 1: versions, and what copies take. The transfer of the weights bounds every pass."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tests.runs.gpu.steps import ON_GPU, show

BYTES = 2**28
ROUNDS = 5


def bandwidth(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second of one copy, the best of some."""
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return source.numel() / best


def host_to_device() -> float:
    """Bytes a second from pinned memory."""
    host = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    return bandwidth(host, torch.empty(BYTES, dtype=torch.uint8, device="cuda"))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Print versions at once, then figures."""
    names = ("torch", "triton", "vllm", "transformers", "s3lora-serve")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        "cores": len(os.sched_getaffinity(0)),
    }
    show(found)
    if ON_GPU:
        found["host_to_device"] = host_to_device()
        here = torch.empty(BYTES, dtype=torch.uint8, device="cuda")
        there = torch.empty_like(here)
        found["device_to_device"] = 2 * bandwidth(here, there)
        show(found)


if __name__ == "__main__":
    main()
