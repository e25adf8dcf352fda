"""`make bench-repair`: repairing an adapter beside scoring it."""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME, copy_adapter
from s3lora_serve.adapter.reader import Adapter, read_adapter
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.apply import repaired
from s3lora_serve.spectral import Factors, InputStatistics, OutputStatistics, score_modules
from s3lora_serve.spectral.factor_coordinates import Coordinates, coordinates
from s3lora_serve.spectral.input_directions import LEADING
from s3lora_serve.spectral.repair_effects import solution
from tests.runs.benchmarks import measure, report, shapes

HERE = Path(__file__).parent
K = 64  # directions of inputs and of outputs, the defaults of `s3lora statistics make`
CASES = [("Llama-3.2-1B", 16), ("Llama-3-8B", 16), ("Llama-3-8B", 64)]
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Projections that take another's input."""


def main() -> None:
    """Measure, write repair.json and RESULTS.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7, help="each figure is the least of these")
    rounds = parser.parse_args().rounds
    cases = [_measured(*case, rounds) for case in track(CASES, "cases", transient=True)]
    data = {"machine": measure.machine(), "k": K, "cases": cases}
    (HERE / "repair.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)


def _measured(model: str, rank: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        adapter = make_adapter(model, rank, Path(folder))
    statistics = make_statistics(adapter)
    factors = [Factors(m.name, m.B, m.A, m.scaling) for m in adapter.modules]
    choice = RepairChoice(statistics=Path("unused"))
    found = repaired(adapter, statistics, choice)
    assert found is not None
    known = coordinates_of(adapter, statistics)
    work = {
        "score": lambda: score_modules(factors, device="cpu"),
        "repair": lambda: repaired(adapter, statistics, choice),
        "more": lambda: solution(known, found.strength / 2),
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, each in work.items():
            started = time.perf_counter()
            each()
            best[name] = min(best[name], time.perf_counter() - started)
    return {
        "model": model, "rank": rank, "modules": len(factors), "seconds": best,
        "statistics_bytes": _size(statistics), "error": _error(adapter, statistics, found),
    }  # fmt: skip


def make_adapter(model: str, rank: int, folder: Path) -> Adapter:
    """An adapter of all projections in bfloat16, as it is admitted."""
    tensors = {}
    for module in shapes.adapter(model, rank, torch.bfloat16):
        for side in "AB":
            name = f"base_model.model.{module.name}.lora_{side}.weight"
            tensors[name] = getattr(module, side).contiguous()
    save_file(tensors, folder / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return read_adapter(copy_adapter(folder, Limits()), Limits())


def make_statistics(adapter: Adapter) -> Any:
    """Directions with falling eigenvalues for each input and output; those of all of one width are
    equal, in memory of their own."""
    draw = torch.Generator().manual_seed(0)
    mu = torch.logspace(1, -2, K, dtype=torch.float64)
    known: dict[int, list[torch.Tensor]] = {}
    sites: dict[str, InputStatistics] = {}
    by_module, outputs = {}, {}
    for module in adapter.modules:
        stem, _, projection = module.name.rpartition(".")
        site = f"{stem}.{SHARED.get(projection, projection)}"
        m, n = module.B.shape[0], module.A.shape[1]
        for width in {m, n} - set(known):
            drawn = (torch.randn(width, K, generator=draw) for _ in range(2))
            known[width] = [torch.linalg.qr(each).Q for each in drawn]
        Q = known[m][0].bfloat16()
        inverse = torch.linalg.inv(Q.double().mT @ Q.double())
        outputs[module.name] = OutputStatistics(Q, mu, 0.1, inverse)
        if site not in sites:
            U, F = known[n][0].bfloat16(), known[n][1][:, :LEADING].bfloat16()
            V = U.clone()
            inverse = torch.linalg.inv(V.double().mT @ U.double())
            sites[site] = InputStatistics(V, U, mu, F, 1e-3, 1e-2, 1e-3, inverse)
        by_module[module.name] = sites[site]
    # Energy without bound: λ stays what it is.
    return SimpleNamespace(sites=sites, by_module=by_module, outputs=outputs, energy=math.inf)


def coordinates_of(adapter: Adapter, statistics: Any) -> dict[str, Coordinates]:
    """The coordinates of all modules."""
    return {
        m.name: coordinates(
            [(m.B, m.A, m.scaling)], statistics.by_module[m.name], [statistics.outputs[m.name]]
        )[0]
        for m in adapter.modules
    }


def _size(statistics: Any) -> int:
    tensors = [part for site in statistics.sites.values() for part in (site.V, site.U, site.F)]
    tensors += [each.Q for each in statistics.outputs.values()]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _error(adapter: Adapter, statistics: Any, found: Any) -> float:
    """Largest difference of an entry of A' or B' from the one made of float64 factors, relative to
    the largest entry."""
    worst = 0.0
    for module in adapter.modules[:7]:
        inputs, outputs = statistics.by_module[module.name], statistics.outputs[module.name]
        B, A = module.B.double(), module.A.double()
        own = coordinates([(B, A, module.scaling)], inputs, [outputs])[0]
        new = solution({"": own}, found.strength).factors[""]
        Y_a = (new.P - new.X_a @ own.P) @ inputs.inverse
        Y_b = outputs.inverse @ (new.S - own.S @ new.X_b)
        dense = (
            new.X_a @ A + Y_a @ inputs.V.double().mT,
            B @ new.X_b + outputs.Q.double() @ Y_b,
        )
        for key, expected in zip(module.keys, dense, strict=True):
            data = bytearray(found.weights.replaced[key][1])
            made = torch.frombuffer(data, dtype=torch.bfloat16).reshape(expected.shape).double()
            worst = max(worst, float((made - expected).abs().max() / expected.abs().max()))
    return worst


def section(data: dict[str, Any]) -> str:
    """The section of RESULTS.md on repair."""
    machine = data["machine"]
    rows = "\n".join(_row(case) for case in data["cases"])
    return f"""\
## Repair

`make bench-repair`, {machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}.
k = q = {data["k"]}, directions and adapter in bfloat16, all projections. *Repair*: B' and A' of all
modules with their checks, and the figures of the verdict, for one λ, as `strength` says; each
smaller one that `max_effect` wants takes *more*. The error is that of B' and A' against
those made of float64 factors, over the largest entry; rounding to bfloat16 makes up to 3.9e-3.

| adapter | r | modules | score, s | repair, s | over score | more, s | statistics, MB | error |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def _row(case: dict[str, Any]) -> str:
    score, repair = case["seconds"]["score"], case["seconds"]["repair"]
    cells = [case["model"], str(case["rank"]), str(case["modules"]), f"{score:.3f}"]
    cells += [f"{repair:.3f}", f"{repair / score:.2f}", f"{case['seconds']['more']:.3f}"]
    cells += [f"{case['statistics_bytes'] / 1e6:.0f}"]
    return f"| {' | '.join(cells)} | {case['error']:.1e} |"


if __name__ == "__main__":
    main()
