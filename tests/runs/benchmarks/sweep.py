"""`make bench-scan`: adapters and bytes per second of `s3lora scan`, compared with `cat`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import save_file

from s3lora_serve.lab.sweeps.sweep import default_jobs
from tests.runs.benchmarks import measure, report
from tests.runs.benchmarks.admission import MODEL, RANK, make_adapter

HERE = Path(__file__).parent
LARGE = 200
SMALL = (1000, 10_000)
ROUNDS = 3
WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    """Measure, write sweep.json and RESULTS.md."""
    with tempfile.TemporaryDirectory(prefix="s3lora-bench-") as folder:
        place = Path(folder)
        for i in range(LARGE):
            make_adapter(place / "large" / f"a{i}", i)
        _make_small(place / "small")
        data = {
            "machine": measure.machine(),
            "model": MODEL,
            "rank": RANK,
            "jobs": default_jobs(),
            "large": _large(place),
            "small": _small(place),
        }
    (HERE / "sweep.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)
    print(json.dumps(data, indent=1))


def _make_small(folder: Path) -> None:
    """Adapters of four modules that differ in their names only."""
    first = folder / "a0"
    first.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        ).to(torch.bfloat16)
        for i in range(4)
        for side, shape in (("A", (8, 64)), ("B", (64, 8)))
    }
    save_file(tensors, first / WEIGHTS)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (first / "adapter_config.json").write_text(json.dumps(config))
    for i in range(1, max(SMALL)):
        shutil.copytree(first, folder / f"a{i}")


def _large(place: Path) -> dict[str, object]:
    """Least seconds of each route, taking turns, first with files on disk, then cached."""
    files = sorted((place / "large").glob(f"*/{WEIGHTS}"))
    size = sum(file.stat().st_size for file in files)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        _drop_from_cache(files)
        for state in ("", ", cached"):
            seconds[f"cat{state}"].append(_run(_cat(files))[0])
        _drop_from_cache(files)
        for state in ("", ", cached"):
            whole, begun = _watched(_scan(place / "large"), len(files))
            seconds[f"scan{state}"].append(whole)
            seconds[f"scan, once begun{state}"].append(begun)
    return {
        "adapters": len(files),
        "bytes": size,
        "seconds": {route: min(found) for route, found in seconds.items()},
    }


def _small(place: Path) -> dict[str, dict[str, float]]:
    """Seconds and the largest process's memory for each number of small adapters."""
    folders = sorted((place / "small").iterdir())
    found = {}
    for count in SMALL:
        listed = place / "list"
        listed.write_text("".join(f"{folder}\n" for folder in folders[:count]))
        with listed.open() as stdin:
            seconds, megabytes = _run(_scan("-"), stdin=stdin)
        found[str(count)] = {"seconds": seconds, "megabytes": megabytes}
    return found


def _cat(files: list[Path]) -> list[str]:
    return ["cat", *map(str, files)]


def _scan(what: object) -> list[str]:
    return [sys.executable, "-m", "s3lora_serve", "scan", str(what), "--format", "jsonl"]


def _watched(command: list[str], count: int) -> tuple[float, float]:
    """Seconds of a scan, and of `count` adapters at the rate from first to last verdict."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        times = [time.perf_counter() for _ in process.stdout]
    assert process.returncode in (0, 1)
    assert len(times) == count
    return time.perf_counter() - started, (times[-1] - times[0]) * count / (count - 1)


def _run(command: list[str], stdin: TextIO | None = None) -> tuple[float, float]:
    """Seconds of a command, and megabytes of the largest of its processes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1)
    return time.perf_counter() - started, used.ru_maxrss / 1000


def _drop_from_cache(files: list[Path]) -> None:
    """Remove the files from the system's page cache."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
