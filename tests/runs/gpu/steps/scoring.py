"""Step 3: the pass over adapters of well-known shapes, beside the CPU's and beside its floor."""

import hashlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from s3lora_serve.spectral import device, fallback, precision, spectral_sharpness
from tests.runs.benchmarks import shapes
from tests.runs.gpu.steps import DEVICE, ON_GPU, show
from tests.runs.gpu.steps.machine import host_to_device

CASES = [
    (model, rank, decades)
    for rank in (16, 64)
    for model in ("Llama-3.2-1B", "Llama-3-8B", "Llama-3-70B")
    for decades in (0.0, 1.0)
]
ROUNDS = 7
TINY = (1, 64, 32, 64)

Modules = list[tuple[torch.Tensor, torch.Tensor]]


def in_one_file(model: str, rank: int, decades: float) -> Modules:
    """Modules of an adapter whose factors lie one after the other, as the reader gives them."""
    made = shapes.adapter(model, rank, torch.bfloat16, decades=decades)
    made = made if ON_GPU else made[:1]  # a module takes seconds in Triton's interpreter
    factors = [factor for module in made for factor in (module.B, module.A)]
    whole = torch.cat([factor.reshape(-1) for factor in factors])
    views, at = [], 0
    for factor in factors:
        views.append(whole[at : at + factor.numel()].view(factor.shape))
        at += factor.numel()
    return list(zip(views[::2], views[1::2], strict=True))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of work that ends with its result on the host."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def case(model: str, rank: int, decades: float, bytes_a_second: float) -> dict[str, Any]:
    """The figures of one adapter."""
    modules = in_one_file(model, rank, decades)
    size = sum(factor.numel() * factor.itemsize for module in modules for factor in module)

    def on(where: str) -> precision.Solution:
        return precision.solve(modules, "two_sided", device=where)

    where = "cuda" if ON_GPU else "cpu:0"
    cold = seconds(lambda: on(where))
    warm = [seconds(lambda: on(where)) for _ in range(ROUNDS if ON_GPU else 1)]
    found, expected = on(where), on("cpu")
    difference = spectral_sharpness(found.normalised) - spectral_sharpness(expected.normalised)
    inexact = sum(int((~(s.error_bound <= 1e-6)).sum()) for s in device.solve(modules, where, int))
    return {
        "model": model, "rank": rank, "decades": decades, "modules": len(modules), "bytes": size,
        "cold": cold, "warm": statistics.median(warm), "cpu": seconds(lambda: on("cpu")),
        "floor": size / bytes_a_second, "to the host": inexact, **before_the_upload(modules),
        "largest difference": float(difference.abs().max()), "fallbacks": fallback.take_counts(),
        **(counts(lambda: on(where)) if ON_GPU else {}),
    }  # fmt: skip


def before_the_upload(modules: Modules) -> dict[str, float]:
    """Seconds of what precedes the first copy to the device: hashing, and staging for it.

    Staging is what an upload that starts while the file is hashed would hide.
    """
    storage = modules[0][0].untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    pinned = torch.empty(len(whole), dtype=torch.uint8, pin_memory=ON_GPU)
    hashing = [seconds(lambda: hashlib.sha256(whole.numpy())) for _ in range(3)]
    staging = [seconds(lambda: pinned.copy_(whole)) for _ in range(3)]
    return {"hashing": statistics.median(hashing), "staging": statistics.median(staging)}


def counts(work: Callable[[], object]) -> dict[str, int]:
    """Kernels, copies and waits of one run, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
    names = [event.name for event in recorded.events()]
    on_device = [e for e in recorded.events() if e.device_type.name == "CUDA"]
    copies = sum("Memcpy" in event.name for event in on_device)
    return {
        "kernels": len(on_device) - copies,
        "copies": copies,
        "waits": sum("Synchronize" in name for name in names),
    }


def main() -> None:
    """Measure the cases, small ones first."""
    torch.set_num_threads(4 if ON_GPU else 1)  # as a server's scoring thread on 16 cores
    if not ON_GPU:
        shapes.MODELS["tiny"] = TINY
    found: dict[str, Any] = {"device": DEVICE, "cases": []}
    bytes_a_second = host_to_device() if ON_GPU else 1e9
    for model, rank, decades in CASES if ON_GPU else [("tiny", 4, 0.0)]:
        found["cases"].append(case(model, rank, decades, bytes_a_second))
        show(found)


if __name__ == "__main__":
    main()
