"""Step 5: a guarded vLLM over HTTP: every door, and answers beside those of the CPU."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.runs.gpu.steps import DEVICE, ENVIRONMENT, ON_GPU, OUT, show
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import PROMPT

PACK = Path(os.environ.get("GPU_PACK", Path(__file__).parents[4] / ".gpu")) / "model"
TOP_K = 3
PROMPTS = [PROMPT.format(country) for country in ("Peru", "France", "Kenya")]
TOLERANCE = 5e-2
"""Between log-probabilities of float16 on a GPU, where LoRA kernels have no float32, and of float32
on a CPU. What is stripped changes them by more."""

ON_A_GPU = (
    "--attention-backend", "TRITON_ATTN",
    "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**30),
)  # fmt: skip
"""Without looking at what is free: other engines start beside it."""


@contextmanager
def guarded(
    folder: Path, device: str, *arguments: str, log: Path | None = None
) -> Iterator[Server]:
    """A guarded server of the tiny model with room for two adapters."""
    with tempfile.TemporaryDirectory() as work:
        policy = Path(work) / "policy.yaml"
        policy.write_text(f"strip: {{top_k: {TOP_K}}}\n")
        environment = OPEN_LOADING | ENVIRONMENT | {
            "S3LORA_POLICY": str(policy), "S3LORA_STATE_DIR": work, "S3LORA_DEVICE": device
        }  # fmt: skip
        arguments = ("--max-cpu-loras", "2", "--max-loras", "1", *arguments)
        server = Server(folder / "base", log or Path(work) / "log", arguments, environment)
        with server:
            yield server


def answers(folder: Path, device: str, *arguments: str) -> dict[str, Any]:
    """Log-probabilities of the base model and of two adapters as the gate serves them."""
    with guarded(folder, device, *arguments) as server:
        for name in ("trained", "spiked"):
            server.load(name, folder / name).raise_for_status()
        return {
            name: [server.logprobs(name, prompt) for prompt in PROMPTS]
            for name in ("base", "trained", "spiked")
        }


def largest_difference(one: Any, other: Any) -> float:
    """Between the numbers of two equal structures; infinite where they differ otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        common = one.keys() & other.keys()
        return max((largest_difference(one[key], other[key]) for key in common), default=1e9)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((largest_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other)
    return 0.0 if one == other else 1e9


def doors(server: Server, folder: Path) -> dict[str, Any]:
    """What each door answers, and what the registrations left."""
    found: dict[str, Any] = {}
    for name in ("trained", "spiked"):
        found[f"load {name}"] = server.load(name, folder / name).status_code
    before = server.logprobs("trained", PROMPTS[0])
    found["refuse NaN"] = server.load("diverged", folder / "diverged").status_code
    found["base after the refusal"] = len(server.logprobs("base", PROMPTS[0])) > 0
    found["third evicts"] = server.load("third", folder / "spiked").status_code
    server.logprobs("third", PROMPTS[0])
    after = server.logprobs("trained", PROMPTS[0])
    found["evicted, re-loaded, alike"] = largest_difference(before, after) <= TOLERANCE
    replaced = server.load("trained", folder / "spiked", load_inplace=True)
    found["replace"] = replaced.status_code
    now = server.logprobs("trained", PROMPTS[0])
    spiked = server.logprobs("spiked", PROMPTS[0])
    found["replaced answers as its new content"] = largest_difference(now, spiked) <= TOLERANCE
    metrics = server.metrics()
    found["metrics"] = {
        name: value for name, value in metrics.items()
        if name.startswith(("s3lora_device_fallbacks", "s3lora_admissions", "s3lora_quarantined"))
        and value
    }  # fmt: skip
    return found


def main() -> None:
    """Compare with the pack's answers, then try the doors."""
    more = (*ON_A_GPU, "--dtype", "float16") if ON_GPU else ()
    expected = json.loads((PACK / "answers.json").read_text())
    with guarded(PACK, DEVICE, *more, log=OUT / "doors.log") as server:
        for name in ("trained", "spiked"):
            server.load(name, PACK / name).raise_for_status()
        now = {n: [server.logprobs(n, prompt) for prompt in PROMPTS] for n in expected}
        found: dict[str, Any] = {
            "largest difference from the CPU's": {
                name: largest_difference(now[name], expected[name]) for name in expected
            }
        }
        show(found)
        for name in ("trained", "spiked"):
            server.unload(name)
        found["doors"] = doors(server, PACK)
        show(found)
        found["log"] = [
            line[-300:] for line in server.log.read_text(errors="replace").splitlines()
            if "s3lora: " in line
        ][:40]  # fmt: skip
        show(found)


if __name__ == "__main__":
    main()
