"""`make gpu-kernels`: what the device's kernels need of a GPU, compiled with both Tritons."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.runs.gpu.oldest_triton import VERSION, oldest_triton

ROOT = Path(__file__).parents[3]
FIGURES = ROOT / "tests" / "runs" / "benchmarks" / "kernels.json"
NEEDS = ("registers", "stack_bytes", "shared_bytes")

FOREWORD = """\
[Figures of an H200](../gpu/RESULTS.md), upload included: 7 to 30 times as fast as four threads of
its host. Scores are held to the dense definition there and in Triton's interpreter
(`tests/spectral/test_device.py`), and kernels are compiled for three architectures with the oldest
and the pinned Triton (`tests/runs/gpu/test_compile.py`).

An adapter of up to 256 MB, matrices included, is one upload, six launches and one copy back,
whatever its number of modules; the host waits once. An 8B model's 224 modules at r = 16 took 30
launches, about 890 other operations and 24 waits before. The upload starts once an adapter is
checked. If it started while the file is hashed, it would hide one copy of the weights in memory, a
tenth of hashing's time, and any file a tenant names would take device memory before it is known to
be an adapter.

What a program needs (`make gpu-kernels`): registers of a thread, of 255; bytes of its stack, which
hold what registers do not; KB of shared memory. Largest of all dtypes and layouts.
"""


def main() -> None:
    """Compile all variants twice and write the figures and RESULTS.md."""
    from tests.runs.benchmarks import report

    tritons = {version("triton"): None, VERSION: oldest_triton()}
    found = {name: compiled(folder) for name, folder in tritons.items()}
    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    report.write(FIGURES.parent)


def section(found: dict[str, list[dict[str, Any]]]) -> str:
    """The section of RESULTS.md on CUDA."""
    most: dict[tuple[str, int, int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for triton, variants in found.items():
        for one in variants:
            key = (one["kernel"], one["rank"], one["architecture"], triton)
            most[key] = [max(*both) for both in zip(most[key], map(one.get, NEEDS), strict=True)]
    columns = sorted({key[2:] for key in most}, key=lambda column: (column[1], column[0]))
    head = [f"sm_{architecture}, Triton {triton}" for architecture, triton in columns]
    rows = [
        [f"`{kernel}`", f"{rank}"] + [_cell(most[kernel, rank, *column]) for column in columns]
        for kernel, rank in sorted({key[:2] for key in most}, key=lambda row: (row[0], row[1]))
    ]
    return "\n".join(
        [
            "## CUDA", "", FOREWORD,
            "| kernel | r | " + " | ".join(head) + " |",
            "|---|---:|" + "---:|" * len(head),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
        ]
    )  # fmt: skip


def _cell(needs: list[int]) -> str:
    registers, stack, shared = needs
    return f"{registers}, {stack}, {shared // 1024}"


def compiled(triton: Path | None, *arguments: str) -> list[dict[str, Any]]:
    """What `compile_ahead` prints with a Triton in a folder; None: the installed one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(triton or ""), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.runs.gpu.compile_ahead",
        *arguments,
    ]
    output = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in output.stdout.splitlines()]


if __name__ == "__main__":
    main()
