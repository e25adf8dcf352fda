"""Repair of adapters of well-known shapes on the CPU, beside scoring there and on the device."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.apply import repaired
from s3lora_serve.spectral import Factors, score_modules
from tests.runs.benchmarks import shapes
from tests.runs.benchmarks.repair import make_adapter, make_statistics
from tests.runs.gpu.steps import DEVICE, ON_GPU, show
from tests.runs.gpu.steps.scoring import seconds

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
    work = {
        "score, CPU": lambda: score_modules(factors, device="cpu"),
        "score, device": lambda: score_modules(factors, device=DEVICE),
        "repair": lambda: repaired(adapter, known, choice),
    }
    for name, each in work.items():
        found[name] = statistics.median(seconds(each) for _ in range(ROUNDS))
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
