"""Repair of adapters of well-known shapes beside scoring them, on the CPU and on the device."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.apply import repaired
from s3lora_serve.spectral import Factors, score_modules
from tests.benchmarks import shapes
from tests.benchmarks.repair import make_adapter, make_statistics
from tests.gpu.steps import DEVICE, ON_GPU, show

CASES = [("Llama-3.2-1B", 16), ("Llama-3-8B", 16), ("Llama-3-8B", 64)]
ROUNDS = 3
TINY = (1, 128, 96, 160)


def case(model: str, rank: int) -> dict[str, Any]:
    """The figures of one adapter."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = make_adapter(model, rank, Path(folder))
    known = make_statistics(adapter)
    factors = [Factors(m.name, m.B, m.A, m.scaling) for m in adapter.modules]
    choice = RepairChoice(statistics=Path("unused"))
    found: dict[str, Any] = {"model": model, "rank": rank, "modules": len(factors)}
    results = []
    for where in ("cpu", DEVICE) if ON_GPU else ("cpu",):
        times: dict[str, list[float]] = {"score": [], "repair": []}
        for _ in range(ROUNDS):
            started = time.perf_counter()
            score_modules(factors, device=where)
            middle = time.perf_counter()
            results.append(repaired(adapter, known, choice, device=where))
            times["score"].append(middle - started)
            times["repair"].append(time.perf_counter() - middle)
        found[where] = {name: statistics.median(each) for name, each in times.items()}
    kept = [each.effect.kept for each in results if each]
    found["largest difference of kept"] = abs(kept[0] - kept[-1])
    return found


def main() -> None:
    """Measure the cases, small ones first."""
    torch.set_num_threads(4 if ON_GPU else 1)
    if not ON_GPU:
        shapes.MODELS["tiny"] = TINY
    found: dict[str, Any] = {"cases": []}
    for model, rank in CASES if ON_GPU else [("tiny", 4)]:
        found["cases"].append(case(model, rank))
        show(found)


if __name__ == "__main__":
    main()
