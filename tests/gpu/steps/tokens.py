"""Step 6: time per token of real vLLM, stock and guarded, by how much is stripped.

`python -m tests.gpu.steps.tokens KIND FOLDER` runs one engine; without arguments, all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.steps import ON_GPU, OUT, show
from tests.gpu.steps.big_model import make_adapter, make_base, module_count
from tests.gpu.steps.doors import PACK
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
SECONDS = 80
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""An engine that is stopped leaves no process that holds the device's memory."""


def engine(folder: Path, *, eager: bool) -> Any:
    """One engine in this process."""
    from vllm import LLM

    more: dict[str, Any] = (
        {
            "attention_backend": "TRITON_ATTN",
            "gpu_memory_utilization": 0.5,
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


def per_token(llm: Any, batch: int, adapter: Any) -> float:
    """Milliseconds between tokens of `batch` requests at once, the best of some rounds."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [5 + i % 7, 9, 11]} for i in range(batch)]
    best = float("inf")
    for _ in range(ROUNDS + 1):  # the first warms up
        times = []
        for count in (1, TOKENS + 1):
            parameters = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0)
            started = time.perf_counter()
            llm.generate(prompts, parameters, lora_request=adapter, use_tqdm=False)
            times.append(time.perf_counter() - started)
        best = min(best, 1000 * (times[1] - times[0]) / TOKENS)
    return best


def run_one(kind: str, folder: Path) -> None:
    """Print what one engine takes for each adapter and batch."""
    from vllm.lora.request import LoRARequest

    _, eager = KINDS[kind]
    llm = engine(folder, eager=eager)
    found: dict[str, Any] = {}
    names = ("none", "whole", "thirty", "all") if kind.startswith("guarded") else ("none", "whole")
    for number, name in enumerate(names):
        adapter = LoRARequest(name, number, str(folder / name)) if number else None
        for batch in BATCHES:
            found.setdefault(name, {})[str(batch)] = per_token(llm, batch, adapter)
            print(json.dumps(found), flush=True)


def policy() -> str:
    """Strip nothing, 30 % of the modules, or all, by the folder's path."""
    share = round(0.3 * module_count())
    return (
        "strip: {top_k: 0}\nrules:\n"
        f"  - match: {{path: '**/thirty'}}\n    strip: {{top_k: {share}}}\n"
        f"  - match: {{path: '**/all'}}\n    strip: {{top_k: {module_count()}}}\n"
    )


def main() -> None:
    """Run the engines, one after the other, each in its own process."""
    if len(sys.argv) > 1:
        run_one(sys.argv[1], Path(sys.argv[2]))
        return
    found: dict[str, Any] = {"milliseconds a token": {}}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_base(folder / "base", PACK / "base")
        for seed, name in enumerate(("whole", "thirty", "all")):
            make_adapter(folder / name, seed)
        (folder / "policy.yaml").write_text(policy())
        for kind, (environment, _) in list(KINDS.items())[: None if ON_GPU else 2]:
            own = (
                CPU
                | IN_ONE_PROCESS
                | {"S3LORA_POLICY": str(folder / "policy.yaml"), "S3LORA_STATE_DIR": work}
            )
            command = [sys.executable, "-m", "tests.gpu.steps.tokens", kind, work]
            try:
                done = subprocess.run(
                    command, env=os.environ | own | environment, capture_output=True, text=True,
                    timeout=SECONDS, check=False,
                )  # fmt: skip
                output, said = done.stdout, done.stderr
                problem = said[-800:] if done.returncode else ""
            except subprocess.TimeoutExpired as stopped:
                output, said = (
                    str(text or b"", "utf-8") for text in (stopped.stdout, stopped.stderr)
                )
                problem = "stopped: no time left"
            with (OUT / "tokens.log").open("a") as log:
                log.write(f"== {kind}\n{said}\n")
            lines = [line for line in output.splitlines() if line.startswith("{")]
            found["milliseconds a token"][kind] = json.loads(lines[-1]) if lines else {}
            if problem:
                found.setdefault("problems", {})[kind] = problem
            show(found)


if __name__ == "__main__":
    main()
