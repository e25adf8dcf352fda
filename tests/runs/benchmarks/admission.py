"""`make bench-admission`: time that the gate adds to loading an adapter and to others' tokens.

Two real vLLM servers (CPU build) of one 1B-like model with random weights, stock and guarded, take
turns in one run. The other server is stopped meanwhile, because vLLM's idle workers use CPU time.
"""

import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.progress import track

from tests.runs.benchmarks import measure, report, shapes
from tests.runs.benchmarks.folders import make_model, save_adapter
from tests.runs.load.watch import processes
from tests.support.server import OPEN_LOADING, Server

HERE = Path(__file__).parent
MODEL, RANK = "Llama-3.2-1B", 16
ADAPTERS = 12
TOKENS = 100
ROUNDS = 3
BETWEEN_LOADS = 1.5  # seconds
POLICY = "on_uninformative: admit\n"
"""Random factors have nearly equal SSI: by default the gate rejects them as uninformative."""

ROOM = ("--load-format", "dummy", "--max-cpu-loras", "4")
PHASES = ("read", "score", "strip", "total")


def main() -> None:
    """Measure, write admission.json and RESULTS.md."""
    with tempfile.TemporaryDirectory(prefix="s3lora-bench-") as folder, ExitStack() as stack:
        place = Path(folder)
        model = make_model(place / "model", *shapes.MODELS[MODEL])
        adapters = [make_adapter(place / f"adapter-{i}", i) for i in range(ADAPTERS)]
        (place / "policy.yaml").write_text(POLICY)
        ours = OPEN_LOADING | {
            "S3LORA_POLICY": str(place / "policy.yaml"),
            "S3LORA_STATE_DIR": str(place / "state"),
        }
        theirs = OPEN_LOADING | {"VLLM_PLUGINS": ""}
        guarded = stack.enter_context(
            Server(model, place / "guarded.log", ROOM, ours, one_process=False)
        )
        stock = stack.enter_context(
            Server(model, place / "stock.log", ROOM, theirs, guarded=False, one_process=False)
        )
        servers = {"stock": stock, "guarded": guarded}
        data = {
            "machine": measure.machine(),
            "model": MODEL,
            "rank": RANK,
            "megabytes": (adapters[0] / "adapter_model.safetensors").stat().st_size / 1e6,
            "loads": _loads(servers, adapters),
            "tokens": _tokens(servers, adapters),
        }
    (HERE / "admission.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)
    print(json.dumps(data, indent=1))


def _loads(servers: dict[str, Server], adapters: list[Path]) -> dict[str, object]:
    """Seconds of `POST /v1/load_lora_adapter`; the servers take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for server in servers.values():  # costs of the first load only
        _load(server, "warm", adapters[0])
    before = servers["guarded"].metrics()
    for folder in track(adapters[1:], "loads", transient=True):
        for name in servers:
            with alone(name, servers) as server:
                seconds[name].append(_load(server, folder.name, folder))
    after = servers["guarded"].metrics()
    sample = 's3lora_admission_seconds_sum{{phase="{}"}}'
    return {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "ratio": statistics.median(seconds["guarded"]) / statistics.median(seconds["stock"]),
        "phases": {
            phase: (after[sample.format(phase)] - before[sample.format(phase)]) / (ADAPTERS - 1)
            for phase in PHASES
        },
    }


def _tokens(servers: dict[str, Server], adapters: list[Path]) -> dict[str, dict[str, float]]:
    """Seconds between tokens of the base model, alone and while adapters are loaded."""
    found: dict[str, list[float]] = {}
    for _ in track(range(ROUNDS), "tokens", transient=True):
        for name in servers:
            with alone(name, servers) as server:
                quiet = found.setdefault(f"{name}, no loads", [])
                quiet.extend(_between_tokens(server, TOKENS // 3))
                over = threading.Event()
                loader = threading.Thread(target=_keep_loading, args=(server, adapters, over))
                loader.start()
                found.setdefault(name, []).extend(_between_tokens(server, TOKENS))
                over.set()
                loader.join()
    return {
        name: {
            "p50": statistics.median(gaps),
            "p99": statistics.quantiles(gaps, n=100)[98],
            "count": len(gaps),
        }
        for name, gaps in found.items()
    }


@contextmanager
def alone(name: str, servers: dict[str, Server]) -> Iterator[Server]:
    """Stop the processes of the other servers while this one is used."""
    others = [server for other, server in servers.items() if other != name]
    pids = [int(p.name) for other in others for p in processes(other.process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield servers[name]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _between_tokens(server: Server, tokens: int) -> Iterator[float]:
    body = {
        "model": "base", "prompt": "Q: What", "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    last = None
    with server.request("POST", "/v1/completions", json=body, stream=True) as answer:
        for line in answer.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if last is not None:
                yield now - last
            last = now


def _keep_loading(server: Server, adapters: list[Path], over: threading.Event) -> None:
    for i in range(10**6):
        if over.wait(BETWEEN_LOADS):
            return
        _load(server, f"meanwhile-{i}", adapters[i % ADAPTERS])


def _load(server: Server, name: str, folder: Path) -> float:
    started = time.perf_counter()
    answer = server.load(name, folder)
    seconds = time.perf_counter() - started
    assert answer.status_code == 200, answer.text
    assert server.unload(name).status_code == 200
    return seconds


def make_adapter(folder: Path, seed: int) -> Path:
    """An adapter of MODEL's shape; its content depends on the seed."""
    folder.mkdir(parents=True)
    tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for module in shapes.adapter(MODEL, RANK, torch.bfloat16):
        kind = "mlp" if module.name.endswith(("gate_proj", "up_proj", "down_proj")) else "self_attn"
        head, _, projection = module.name.rpartition(".")
        for side, tensor in (("A", module.A), ("B", module.B)):
            noise = torch.randn(tensor.shape, generator=generator) * 0.01
            key = f"base_model.model.{head}.{kind}.{projection}.lora_{side}.weight"
            tensors[key] = noise.to(torch.bfloat16)
    return save_adapter(folder, tensors, RANK)


if __name__ == "__main__":
    main()
