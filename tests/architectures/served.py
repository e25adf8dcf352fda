"""A program: one real engine serves adapters one after the other and prints what each answers.

With VLLM_PLUGINS="" the engine is stock vLLM, else it is guarded.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support.programs import print_result, run_program
from tests.support.server import ONE_CORE, ONE_PROCESS

PROMPT = "Q: What is the capital of France? A:"
STOCK = {"VLLM_PLUGINS": ""}
KEEP_ALL = '{"strip": {"top_k": 0}, "on_uninformative": "admit"}'

Answer = list[float]
"""Log-probabilities of the prompt's and the answer's tokens; or an embedding; or class scores."""


def served(
    model: Path,
    adapters: dict[str, Path],
    policy: Path | None,
    *,
    asks: str = "generate",
    skipped: tuple[str, ...] = (),
    **engine: Any,
) -> Any:
    """What an engine of this model answers: alone (`base`), and with each adapter.

    Without a policy the engine is stock vLLM's. `asks` is `generate`, `embed` or `classify`;
    `skipped` are prefixes that the model's class is made to skip, as some do.
    """
    job = {
        "model": str(model),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "asks": asks,
        "skipped": skipped,
        "engine": engine,
    }
    own = STOCK if policy is None else {"S3LORA_POLICY": str(policy)}
    program = ("-m", "tests.architectures.served", json.dumps(job))
    found, _ = run_program(*program, **ONE_CORE, **own)
    return found


def main(job: dict[str, Any]) -> None:
    """Serve a job's adapters, each with its answer, or the engine's error."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    if job["skipped"]:
        _skip(tuple(job["skipped"]))
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_num_seqs": 4,
        "max_loras": 1,
        "distributed_executor_backend": ONE_PROCESS,
    }
    llm = LLM(job["model"], **settings | job["engine"])
    found: dict[str, Any] = {"base": _answer(llm, job["asks"], None)}
    guarded = os.environ.get("VLLM_PLUGINS") != ""
    for number, (name, folder) in enumerate(job["adapters"].items(), 1):
        request = LoRARequest(name, number, folder)
        one: dict[str, Any] = {}
        try:
            llm.llm_engine.add_lora(request)
            if guarded:
                [(_, one["refused"])] = llm.collective_rpc("s3lora_loaded", args=("", number))
            one["answer"] = _answer(llm, job["asks"], request)
        except Exception as error:  # noqa: BLE001 - it is what is asked for
            one["error"] = f"{type(error).__name__}: {error}"
        llm.llm_engine.remove_lora(number)
        found[name] = one
    print_result(found)


def _skip(prefixes: tuple[str, ...]) -> None:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    LlamaForCausalLM.lora_skip_prefixes = list(prefixes)


def _answer(llm: Any, asks: str, request: Any) -> Answer:
    from vllm import SamplingParams

    if asks == "embed":
        [made] = llm.embed([PROMPT], lora_request=request, use_tqdm=False)
        return [float(value) for value in made.outputs.embedding]
    if asks == "classify":
        [made] = llm.classify([PROMPT], lora_request=request, use_tqdm=False)
        return [float(value) for value in made.outputs.probs]
    asked = SamplingParams(max_tokens=4, temperature=0, logprobs=1)
    [made] = llm.generate([PROMPT], asked, lora_request=request, use_tqdm=False)
    [output] = made.outputs
    tokens = zip(output.token_ids, output.logprobs, strict=True)
    return [float(token) for token in output.token_ids] + [
        float(each[token].logprob) for token, each in tokens
    ]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
