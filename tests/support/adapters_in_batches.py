"""`python -m tests.support.adapters_in_batches MODEL STATE WHOLE NOTHING`: one engine under the
gate; which adapters its worker sees in each step, and what is answered, as JSON.

WHOLE and NOTHING are folders of one adapter; the policy strips all of NOTHING.
"""

import sys
from pathlib import Path

from tests.support.adapters import WEIGHTS
from tests.support.programs import print_result
from tests.support.server import ONE_PROCESS

QUESTION = "Q: What is the capital of " + ", of ".join(["Peru", "France", "Kenya"] * 12) + "? A:"
"""Longer than one block of the prefix cache."""


def adapters_seen(worker):
    """The names of the adapters in the worker's batches since the last call, one list a batch."""
    runner = worker.model_runner
    if not hasattr(runner, "seen"):
        runner.seen, original = [], runner._set_active_loras

        def noting(prompts, tokens, requests, *rest):
            runner.seen.append(sorted(request.lora_name for request in requests))
            return original(prompts, tokens, requests, *rest)

        runner._set_active_loras = noting
    seen, runner.seen = runner.seen, []
    return seen


class Engine:
    """A real engine with room for two adapters."""

    def __init__(self, model, whole, nothing):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.llm = LLM(
            model, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
            max_lora_rank=16, max_loras=2, max_cpu_loras=2, max_num_seqs=8, seed=0,
            enable_prefix_caching=True, block_size=32, distributed_executor_backend=ONE_PROCESS,
        )  # fmt: skip
        folders = {"whole": whole, "second": whole, "third": whole, "nothing": nothing}
        self.requests = {
            name: LoRARequest(name, i, folder)
            for i, (name, folder) in enumerate(folders.items(), 1)
        }

    def ask(self, *names, cached=False):
        """Answers, adapters in the batches, and prompt tokens that came from the prefix cache."""
        from vllm import SamplingParams

        if not cached:
            assert self.llm.reset_prefix_cache()
        self.llm.collective_rpc(adapters_seen)
        adapters = [self.requests.get(name) for name in names]
        params = SamplingParams(max_tokens=4, temperature=0, logprobs=3)
        prompts = [QUESTION] * len(names)
        out = self.llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        [batches] = self.llm.collective_rpc(adapters_seen)
        return {
            "answers": [_log_probabilities(one) for one in out],
            "seen": [list(names) for names in set(map(tuple, batches))],
            "cached": [one.num_cached_tokens for one in out],
        }


def _log_probabilities(answer):
    """Those of the likeliest tokens at each position."""
    positions = answer.outputs[0].logprobs
    return [sorted(each.logprob for each in position.values()) for position in positions]


def main():
    """Ask the engine in several ways and print what was found."""
    model, state, whole, nothing = sys.argv[1:]
    engine = Engine(model, whole, nothing)
    found = {name: engine.ask(name) for name in ("base", "nothing", "whole")}
    found["together"] = engine.ask("nothing", "whole", "base")
    engine.ask("base")
    found["after base"] = engine.ask("nothing", cached=True)
    engine.ask("second")
    engine.ask("third")  # evicts "whole", whose copy is damaged before it is loaded again
    for copy in Path(state).glob(f"s3lora-*/*/{WEIGHTS}"):
        copy.write_bytes(b"\x7f" * copy.stat().st_size)
    found["quarantine"] = engine.ask("whole")
    found["quarantined"] = engine.ask("whole")
    print_result(found)


if __name__ == "__main__":
    main()
