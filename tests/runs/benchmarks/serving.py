"""`make bench-serving`: an adapter's cost at inference, by the number of stripped modules.

One engine under the gate alternates between skipping and computing. Two real vLLM servers (CPU
build, eager), stock and guarded, take turns in one run: each is stopped during the other's turn.
All of them serve one small model with random weights.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.progress import track

from tests.runs.benchmarks import measure, report
from tests.runs.benchmarks.admission import alone
from tests.runs.benchmarks.folders import make_model, save_adapter
from tests.runs.benchmarks.toggled import (
    BATCHES,
    NEW_TOKENS,
    PHASES,
    PROMPT_TOKENS,
    phase_seconds,
    ratios,
)
from tests.support.programs import run_program
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import LAYERS, PROJECTIONS

HERE = Path(__file__).parent
WIDTH, KEYS, INNER, RANK = 512, 256, 1408, 16
SHAPES = {
    "q_proj": (WIDTH, WIDTH), "k_proj": (KEYS, WIDTH), "v_proj": (KEYS, WIDTH),
    "o_proj": (WIDTH, WIDTH), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH),
    "down_proj": (WIDTH, INNER),
}  # fmt: skip
POLICY = """
on_uninformative: admit
strip: {threshold: 1.0}
limits: {max_stripped_fraction: 1.0}
rules:
  - {match: {adapter: ten}, strip: {top_k: 10}}
  - {match: {adapter: half}, strip: {fraction: 0.5}}
  - {match: {adapter: all}, strip: {fraction: 1.0}}
"""
STRIPPED = {"whole": 0, "ten": 10, "half": 14, "all": 28}
BESIDE = ("base", "whole")
"""Requested from both servers; a server without the gate cannot strip."""

STARTS = 4
"""Identical processes differ in speed by several percent for their whole lifetime. Each start of
the two servers is one sample of that."""

ROOM = ("--load-format", "dummy", "--max-loras", "4", "--no-enable-prefix-caching")


def main() -> None:
    """Measure, write serving.json and RESULTS.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=16, help="each figure is over all of these")
    parser.add_argument("--pairs", type=int, default=60, help="those near 1 are over so many")
    rounds, pairs = vars(parser.parse_args()).values()
    with tempfile.TemporaryDirectory(prefix="s3lora-bench-") as folder:
        place = Path(folder)
        model = make_model(place / "model", LAYERS, WIDTH, KEYS, INNER)
        adapter = _make_adapter(place / "adapter")
        (place / "policy.yaml").write_text(POLICY)
        guarded = OPEN_LOADING | {
            "S3LORA_POLICY": str(place / "policy.yaml"),
            "S3LORA_STATE_DIR": str(place / "state"),
        }
        in_rounds, in_pairs = _toggled(model, adapter, guarded, rounds, pairs)
        throughput = [_throughput(model, adapter, guarded, place, i, pairs) for i in range(STARTS)]
        data = {
            "machine": measure.machine(),
            "model": {"layers": LAYERS, "width": WIDTH, "inner": INNER, "rank": RANK},
            "tokens": {"prompt": PROMPT_TOKENS, "new": NEW_TOKENS},
            "rounds": rounds,
            "seconds": in_rounds,
            "pairs": in_pairs,
            "starts": STARTS,
            "servers": {
                case: {
                    name: [ratio for one in throughput for ratio in one[case][name]]
                    for name in BESIDE
                }
                for case in in_pairs
            },
        }
    (HERE / "serving.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)
    print(json.dumps(data, indent=1))


def _throughput(
    model: Path, adapter: Path, guarded: dict[str, str], place: Path, start: int, pairs: int
) -> dict[str, dict[str, list[float]]]:
    """Ratios of stock's seconds to guarded's, with both servers newly started."""
    environments = {"stock": OPEN_LOADING | {"VLLM_PLUGINS": ""}, "guarded": guarded}
    order = list(environments)[:: -1 if start % 2 else 1]
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                Server(
                    model,
                    place / f"{name}.log",
                    ROOM,
                    environments[name],
                    name != "stock",
                    one_process=False,
                )
            )
            for name in order
        }
        assert servers["stock"].load("whole", adapter).status_code == 200
        for served, count in STRIPPED.items():
            assert servers["guarded"].load(served, adapter).status_code == 200
            assert _stripped(servers["guarded"], served) == count
            if served not in BESIDE:
                servers["guarded"].unload(served)
        return _compared(servers, pairs // STARTS)


def _compared(servers: dict[str, Server], number: int) -> dict[str, dict[str, list[float]]]:
    """Ratios by phase and batch, then by adapter."""
    found: dict[str, dict[str, list[float]]] = {}

    def ask(name: str, served: str, batch: int) -> tuple[float, float]:
        with alone(name, servers) as server:
            return phase_seconds(partial(_timed, server, served), batch)

    for _ in track(range(number), "pairs", transient=True):
        for batch, served in product(BATCHES, BESIDE):
            both = ratios(*(partial(ask, name, served, batch) for name in ("stock", "guarded")))
            for phase, ratio in zip(PHASES, both, strict=True):
                found.setdefault(f"{phase}, {batch}", {}).setdefault(served, []).append(ratio)
    return found


def _toggled(
    model: Path, adapter: Path, guarded: dict[str, str], rounds: int, pairs: int
) -> list[dict[str, dict[str, list[float]]]]:
    """Seconds in rounds and ratios in pairs of the engine that alternates skipping."""
    paths = {"PYTHONPATH": str(Path.cwd()), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    words = model, adapter, rounds, pairs
    found: list[dict[str, dict[str, list[float]]]]
    program = "-m", "tests.runs.benchmarks.toggled"
    found, _ = run_program(*program, *words, seconds=None, **guarded, **paths)
    return found


def _timed(server: Server, served: str, prompts: list[list[int]], tokens: int) -> float:
    started = time.perf_counter()
    answer = server.post(
        "/v1/completions", model=served, prompt=prompts, max_tokens=tokens, temperature=0,
        ignore_eos=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert answer.json()["usage"]["completion_tokens"] == tokens * len(prompts), answer.text
    return seconds


def _stripped(server: Server, name: str) -> int:
    modules = server.get(f"/s3lora/adapters/{name}").json()["modules"]
    return sum(module["stripped"] for module in modules)


def _make_adapter(folder: Path) -> Path:
    """Modules whose spectra decrease at different rates, so that the policy can rank them."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for place in range(LAYERS * len(PROJECTIONS)):
        layer, projection = divmod(place, len(PROJECTIONS))
        name = PROJECTIONS[projection]
        (m, n), kind = SHAPES[name], "mlp" if projection >= 4 else "self_attn"
        fall = torch.logspace(0, -place / 10, RANK)
        for side, tensor in (
            ("A", torch.randn(RANK, n, generator=generator)),
            ("B", torch.randn(m, RANK, generator=generator) * fall),
        ):
            key = f"base_model.model.model.layers.{layer}.{kind}.{name}.lora_{side}.weight"
            tensors[key] = tensor * 0.01
    return save_adapter(folder, tensors, RANK)


if __name__ == "__main__":
    main()
