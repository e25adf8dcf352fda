"""`make bench-alignment`: alignment scorers beside MAS-SVD, and the making of a reference."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file

from s3lora_serve.lab.make_reference import ReferenceOptions, make_reference
from s3lora_serve.spectral import (
    Factors,
    Scorer,
    Subspace,
    alignment,
    dense_reference,
    score_modules,
)
from tests.runs.benchmarks import measure, report, shapes

HERE = Path(__file__).parent
RANK = 128  # the default of `s3lora reference make`
CASES = [("Llama-3.2-1B", 16), ("Llama-3-8B", 16), ("Llama-3-8B", 64)]
MADE = "Llama-3.2-1B"


def main() -> None:
    """Measure, write alignment.json and RESULTS.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5, help="each figure is the least of these")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        print(json.dumps(_made_in(arguments.make)))
        return
    cases = [_scored(*case, arguments.rounds) for case in track(CASES, "cases", transient=True)]
    data = {"machine": measure.machine(), "k": RANK, "cases": cases, "made": _made()}
    (HERE / "alignment.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)


def _scored(model: str, rank: int, rounds: int) -> dict[str, Any]:
    modules = shapes.adapter(model, rank, torch.bfloat16)
    subspaces = _subspaces(modules)
    updates = [(module.B, module.A, module.scaling) for module in modules]
    scorers = {name: Scorer(name) for name in ("safe-lora", "splora")}
    best: dict[str, float] = {}

    def timed(name: str, run: Any) -> None:
        started = time.perf_counter()
        run()
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)

    for _ in range(rounds):
        timed("mas-svd", lambda: score_modules(modules, device="cpu"))
        timed("floor", lambda: _floor(modules, subspaces))
        timed("safe-lora", lambda: alignment.safe_lora(updates, subspaces))
        timed("splora", lambda: alignment.splora(updates, subspaces))
    return {"model": model, "rank": rank, "modules": len(modules), "seconds": best} | {
        "errors": _errors(modules, subspaces, scorers)
    }


def _subspaces(modules: Sequence[Factors]) -> list[Subspace]:
    """Random orthonormal directions with falling values; one matrix for all modules of m rows."""
    draw = torch.Generator().manual_seed(0)
    values = torch.logspace(0, -2, RANK, dtype=torch.float64)
    found: dict[int, Subspace] = {}
    for module in modules:
        m = len(module.B)
        if m not in found:
            U = torch.linalg.qr(torch.randn(m, RANK, generator=draw)).Q.bfloat16()
            found[m] = Subspace(U, values, 1.2 * float(values.norm()), U.double().mT @ U.double())
    return [
        Subspace(space.U.clone(), values, space.frobenius, space.gram)
        for space in (found[len(module.B)] for module in modules)
    ]


def _floor(modules: Sequence[Factors], subspaces: Sequence[Subspace]) -> None:
    """UᵀB and one Gram pass over A in float32 blocks, which every route needs."""
    for module, space in zip(modules, subspaces, strict=True):
        for at in range(0, len(module.B), 4096):
            space.U[at : at + 4096].float().mT @ module.B[at : at + 4096].float()
        A = module.A.float()
        A @ A.mT


def _errors(
    modules: Sequence[Factors], subspaces: Sequence[Subspace], scorers: dict[str, Scorer]
) -> dict[str, float]:
    """Largest difference from the dense float64 reference, on the modules of the fewest rows."""
    small = min(len(module.B) for module in modules)
    chosen = [i for i, module in enumerate(modules) if len(module.B) == small][:12]
    some, spaces = [modules[i] for i in chosen], [subspaces[i] for i in chosen]
    updates = [(module.B, module.A, module.scaling) for module in some]
    dense = {
        "safe-lora": dense_reference.safe_lora(updates, spaces),
        "splora": dense_reference.splora(updates, spaces),
    }
    return {
        name: max(
            abs((score.alignment or 0.0) - value)
            for score, value in zip(
                score_modules(some, scorer, device="cpu", subspaces=spaces),
                dense[name].tolist(),
                strict=True,
            )
        )
        for name, scorer in scorers.items()
    }


def _made() -> dict[str, Any]:
    """Seconds and peak memory of making a reference, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        _write_checkpoints(Path(folder))
        command = [
            sys.executable,
            "-m",
            "tests.runs.benchmarks.alignment",
            "--make",
            folder,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def _write_checkpoints(folder: Path) -> None:
    """A checkpoint shaped for MADE, and one that differs in a falling spectrum of 300 values."""
    weights = {}
    for module in shapes.adapter(MADE, 1, torch.bfloat16):
        m, n = len(module.B), module.A.shape[1]
        weights[f"{module.name}.weight"] = torch.randn(m, n).mul_(0.02).bfloat16()
    for name, change in (("base", 0.0), ("aligned", 1e-3)):
        (folder / name).mkdir()
        if change:
            fall = torch.logspace(0, -2, 300)
            for weight in weights.values():
                left, right = (
                    torch.randn(len(weight), 300) * fall,
                    torch.randn(300, weight.shape[1]),
                )
                weight += (change * left @ right / 300**0.5).bfloat16()
        save_file(weights, folder / name / "model.safetensors")


def _made_in(folder: Path) -> dict[str, Any]:
    resident = measure.resident()
    started = time.perf_counter()
    about = make_reference(
        folder / "base",
        folder / "aligned",
        folder / "reference.safetensors",
        ReferenceOptions(rank=RANK),
    )
    seconds = time.perf_counter() - started
    largest = max(m * n for m, n in (record.shape for record in about.modules.values())) * 4
    size = (folder / "reference.safetensors").stat().st_size
    shutil.rmtree(folder / "base")
    return {
        "model": MADE,
        "modules": len(about.modules),
        "seconds": seconds,
        "largest_module_bytes": largest,
        "peak_extra_bytes": measure.peak() - resident,
        "file_bytes": size,
    }


if __name__ == "__main__":
    main()
