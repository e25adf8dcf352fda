"""A program: one real engine serves adapters one after the other and prints what each answers.

With VLLM_PLUGINS="" the engine is stock vLLM, else it is guarded.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.programs import print_result, run_program
from tests.support.server import ONE_CORE, ONE_PROCESS
from tests.support.slots import slot_buffers

PROMPT = "Q: What is the capital of France? A:"
STOCK = {"VLLM_PLUGINS": ""}
KEEPS = {"strip": {"top_k": 0}, "on_uninformative": "admit"}
KEEP_ALL = json.dumps(KEEPS)

ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "enable_lora": True,
    "max_lora_rank": 16, "max_num_seqs": 4, "max_loras": 1,
    "distributed_executor_backend": ONE_PROCESS,
}  # fmt: skip
"""A small engine with one slot, for adapters one after the other."""

Answer = list[float]
"""An answer's tokens and their log-probabilities; or an embedding; or class scores."""


def served(
    model: Path,
    adapters: dict[str, Path],
    policy: Path | None,
    *,
    asks: str = "generate",
    skipped: tuple[str, ...] = (),
    request: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Any:
    """What an engine of this model answers: alone (`base`), and with each adapter.

    Without a policy the engine is stock vLLM's. `asks` is `generate`, `image`, `embed`, `classify`,
    or `slots`: only what the engine's slot then holds, where a CPU build cannot run it. `skipped`
    are prefixes that the model's class is made to skip, as some do.
    """
    job = {
        "model": str(model),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "asks": asks,
        "skipped": skipped,
        "request": dict(request or {}),
        "engine": engine,
    }
    own = dict(STOCK) if policy is None else {"S3LORA_POLICY": str(policy)}
    own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the whole engine in one process
    program = ("-m", "tests.runs.architectures.served", json.dumps(job))
    with tempfile.TemporaryDirectory() as state:
        found, _ = run_program(*program, **ONE_CORE, **own, S3LORA_STATE_DIR=state)
    return found


def main(job: dict[str, Any]) -> None:
    """Serve a job's adapters, each with its answer, or the engine's error."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    if job["skipped"]:
        _skip(tuple(job["skipped"]))
    guarded = os.environ.get("VLLM_PLUGINS") != ""
    try:
        llm = LLM(job["model"], **ENGINE | job["engine"])
        found: dict[str, Any] = {"base": _answer(llm, job["asks"], None)}
    except Exception as error:  # noqa: BLE001
        print_result({"failed": f"{type(error).__name__}: {error}"})
        return
    for number, (name, folder) in enumerate(job["adapters"].items(), 1):
        request = LoRARequest(name, number, folder, **job["request"])
        one: dict[str, Any] = {}
        try:
            llm.llm_engine.add_lora(request)
            if guarded:
                [(key, one["refused"])] = llm.collective_rpc("s3lora_loaded", args=("", number))
                one["verdict"] = _verdict(key)
            [one["slot"]] = llm.collective_rpc(_slot, args=(number,))
            one["answer"] = _answer(llm, job["asks"], request)
        except Exception as error:  # noqa: BLE001 - it is what is asked for
            one["error"] = f"{type(error).__name__}: {error}"
        llm.llm_engine.remove_lora(number)
        found[name] = one
    print_result(found)


def _skip(prefixes: tuple[str, ...]) -> None:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    LlamaForCausalLM.lora_skip_prefixes = list(prefixes)


def _verdict(key: str | None) -> dict[str, Any] | None:
    """The stored verdict of what was loaded; None of a refused adapter."""
    found = Path(os.environ["S3LORA_STATE_DIR"]).rglob(f"{key}*/verdict.json")
    return next((json.loads(file.read_text()) for file in found), None) if key else None


def _slot(worker: Any, adapter_id: int) -> dict[str, str]:
    """Digests of what an adapter's slot holds that is not zero, by layer."""
    manager = worker.model_runner.lora_manager._adapter_manager
    manager.activate_adapter(adapter_id)
    slot = manager.lora_index_to_id.index(adapter_id)
    return {
        name: hashlib.sha256(buffer.float().numpy().tobytes()).hexdigest()
        for name, buffer in slot_buffers(manager, slot)
    }


def _answer(llm: Any, asks: str, request: Any) -> Answer:
    from vllm import SamplingParams

    if asks == "slots":
        return []
    if asks == "embed":
        [made] = llm.embed([PROMPT], lora_request=request, use_tqdm=False)
        return [float(value) for value in made.outputs.embedding]
    if asks == "classify":
        [made] = llm.classify([PROMPT], lora_request=request, use_tqdm=False)
        return [float(value) for value in made.outputs.probs]
    asked = SamplingParams(max_tokens=4, temperature=0, logprobs=1)
    prompt: Any = PROMPT
    if asks == "image":
        image = Image.linear_gradient("L").resize((28, 28)).convert("RGB")
        prompt = {"prompt": f"<image>{PROMPT}", "multi_modal_data": {"image": image}}
    [made] = llm.generate([prompt], asked, lora_request=request, use_tqdm=False)
    [output] = made.outputs
    tokens = zip(output.token_ids, output.logprobs, strict=True)
    return [float(token) for token in output.token_ids] + [
        float(each[token].logprob) for token, each in tokens
    ]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
