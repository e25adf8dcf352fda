"""Step 6: time per token of real vLLM, stock and guarded, by how much is stripped.

`python -m tests.runs.gpu.steps.tokens KIND FOLDER` runs one engine; without arguments, all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tests.runs.gpu.steps import ENVIRONMENT, ON_GPU, OUT, show
from tests.runs.gpu.steps.big_model import make_adapter, make_base, module_count
from tests.runs.gpu.steps.doors import PACK
from tests.runs.gpu.steps.turns import is_up, note_up, turn, wait_for
from tests.support.server import CPU, ONE_PROCESS

TOKENS = 128 if ON_GPU else 4
BATCHES = (1, 8, 32) if ON_GPU else (1,)
ROUNDS = 3
KINDS = {  # environment, eager
    "guarded": ({"S3LORA_SKIP_CAPTURED": "1"}, False),
    "stock": ({"VLLM_PLUGINS": ""}, False),
    "guarded without skipping": ({"S3LORA_SKIP_STRIPPED": "0"}, False),
    "guarded, eager": ({}, True),
    "stock, eager": ({"VLLM_PLUGINS": ""}, True),
}
SECONDS = 40 if ON_GPU else 200
"""Of one engine's measurements."""

IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""An engine that is stopped leaves no process that holds the device's memory."""


def engine(folder: Path, *, eager: bool) -> Any:
    """One engine in this process."""
    from vllm import LLM

    more: dict[str, Any] = (
        {
            "attention_backend": "TRITON_ATTN",
            "gpu_memory_utilization": 0.05,
            "kv_cache_memory_bytes": 2**31,
            "dtype": "bfloat16",
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        }
        if ON_GPU
        else {"dtype": "float32", "distributed_executor_backend": ONE_PROCESS}
    )
    return LLM(
        str(folder / "base"), load_format="dummy", enforce_eager=eager, enable_lora=True,
        max_lora_rank=16, max_loras=2, max_cpu_loras=8, max_model_len=512, max_num_seqs=32, **more,
    )  # fmt: skip


def per_token(llm: Any, batch: int, adapter: Any, rounds: int) -> float:
    """Milliseconds between tokens of `batch` requests at once, the best of some rounds."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [5 + i % 7, 9, 11]} for i in range(batch)]
    best: dict[int, float] = {}
    for round_ in range(rounds + 1):  # the first warms up
        for count in (1, TOKENS + 1):
            parameters = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0)
            started = time.perf_counter()
            llm.generate(prompts, parameters, lora_request=adapter, use_tqdm=False)
            took = time.perf_counter() - started
            if round_:
                best[count] = min(took, best.get(count, took))
    return 1000 * (best[TOKENS + 1] - best[1]) / TOKENS


def run_one(kind: str, folder: Path) -> None:
    """Print what one engine takes for each adapter and batch."""
    from vllm.lora.request import LoRARequest

    _, eager = KINDS[kind]
    llm = engine(folder, eager=eager)
    note_up(kind)
    wait_for(lambda: (folder / f"{kind}.go").exists())
    found: dict[str, Any] = {}
    names = ("none", "whole", "thirty", "all") if kind.startswith("guarded") else ("none", "whole")
    for number, name in enumerate(names):
        adapter = LoRARequest(name, number, str(folder / name)) if number else None
        for batch in (1, 32) if eager and ON_GPU else BATCHES:
            found.setdefault(name, {})[str(batch)] = per_token(
                llm, batch, adapter, 1 if eager else ROUNDS
            )
            print(json.dumps(found), flush=True)


def policy() -> str:
    """Strip nothing, 30 % of the modules, or all, by the folder's path."""
    share = round(0.3 * module_count())
    return (
        "strip: {top_k: 0}\nlimits: {max_stripped_fraction: 1.0}\nrules:\n"
        f"  - match: {{path: '**/thirty'}}\n    strip: {{top_k: {share}}}\n"
        f"  - match: {{path: '**/all'}}\n    strip: {{top_k: {module_count()}}}\n"
    )


class Engine:
    """One engine in a process of its own."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder
        own = {"S3LORA_POLICY": str(folder / "policy.yaml"), "S3LORA_STATE_DIR": str(folder)}
        environment = CPU | ENVIRONMENT | IN_ONE_PROCESS | own | KINDS[kind][0]
        self._output, self._said = (folder / f"{kind}.{end}" for end in ("out", "err"))
        with self._output.open("w") as output, self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.runs.gpu.steps.tokens", kind, str(folder)],
                env=os.environ | environment, stdout=output, stderr=said,
            )  # fmt: skip

    def is_up(self) -> bool:
        """Whether it waits for its turn, or has ended."""
        return is_up(self.kind) or self._process.poll() is not None

    def measured(self) -> tuple[dict[str, Any], str]:
        """Let it measure; what it found, and what went wrong."""
        (self._folder / f"{self.kind}.go").touch()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS)
        problem = "" if self._process.poll() == 0 else f"ended with {self._process.poll()}"
        self._process.kill()
        output, said = (file.read_text() for file in (self._output, self._said))
        with (OUT / "tokens.log").open("a") as log:
            log.write(f"== {self.kind}\n{output}\n{said}\n")
        lines = [line for line in output.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}, problem

    def stop(self) -> None:
        """End it."""
        self._process.kill()


def main() -> None:
    """Start all engines, then let one after the other measure."""
    if len(sys.argv) > 1:
        run_one(sys.argv[1], Path(sys.argv[2]))
        return
    found: dict[str, Any] = {"milliseconds a token": {}}
    with tempfile.TemporaryDirectory() as work, ExitStack() as engines:
        folder = Path(work)
        make_base(folder / "base", PACK / "base")
        for seed, name in enumerate(("whole", "thirty", "all")):
            make_adapter(folder / name, seed)
        (folder / "policy.yaml").write_text(policy())
        made = [Engine(kind, folder) for kind in list(KINDS)[: None if ON_GPU else 2]]
        for one in made:
            engines.callback(one.stop)
        wait_for(lambda: all(one.is_up() for one in made))
        with turn("tokens"):
            for one in made:
                figures, problem = one.measured()
                found["milliseconds a token"][one.kind] = figures
                if problem:
                    found.setdefault("problems", {})[one.kind] = problem
                show(found)


if __name__ == "__main__":
    main()
