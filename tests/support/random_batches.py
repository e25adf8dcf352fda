"""`python -m tests.support.random_batches MODEL WORKERS FOLDER…`: one engine under the gate runs
every batch with module skipping and without; the result is printed as JSON.

There are more adapters than slots, chunked prompts, shared prefixes, and base-model requests in
the same batches.
"""

import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.programs import print_result
from tests.support.server import ONE_PROCESS
from tests.support.tiny_model import CAPITALS, PROMPT

SLOTS, PIECE, ROUNDS, OPERATIONS = 3, 32, 40, 600


OPS = "add_lora_linear", "add_lora_embedding", "add_lora_logits"
"""Operations that can be skipped."""


def switch(worker, on):
    """Install the skipping operations, or vLLM's own; return whether they are installed."""
    from vllm.lora.layers import BaseLayerWithLoRA

    modules = worker.model_runner.lora_manager._adapter_manager.modules.values()
    layers = [layer for layer in modules if isinstance(layer, BaseLayerWithLoRA)]
    installed = []
    for wrapper in {id(layer.punica_wrapper): layer.punica_wrapper for layer in layers}.values():
        if OPS[0] in vars(wrapper):
            wrapper.skipping = {op: vars(wrapper)[op] for op in OPS}
        if not on:
            for op in OPS:
                vars(wrapper).pop(op, None)
        elif hasattr(wrapper, "skipping"):
            vars(wrapper).update(wrapper.skipping)
        installed.append(all(op in vars(wrapper) for op in OPS))
    return all(installed)


def calls(worker):
    """Forward passes and LoRA operations since the last call.

    `slices` counts operations of linear layers, `ends` those of the embedding and the logits.
    """
    from vllm.lora.punica_wrapper import punica_cpu

    names = {"sgmv_expand_slice": "slices", "sgmv_expand": "ends", "bgmv_expand": "ends"}
    none = {"slices": 0, "ends": 0, "passes": 0}
    runner = worker.model_runner

    def counting(what, original):
        def counted(*args, **more):
            punica_cpu.counted[what] += 1
            return original(*args, **more)

        return counted

    if not hasattr(punica_cpu, "counted"):
        punica_cpu.counted = dict(none)
        for name, what in names.items():
            setattr(punica_cpu, name, counting(what, getattr(punica_cpu, name)))
        runner._model_forward = counting("passes", runner._model_forward)
    found, punica_cpu.counted = punica_cpu.counted, none
    return found


def operations(worker, seed, number):
    """Run single operations of the layers on the adapters now in the slots, with random tokens.

    Returns how many skipped something, differed from vLLM's own result, or changed rows of
    base-model requests: first for the linear layers, then for the embedding and the logits.
    """
    import torch
    from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping

    picked, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    manager = worker.model_runner.lora_manager._adapter_manager
    layers = [each for each in manager.modules.values() if isinstance(each, BaseLayerWithLoRA)]
    linear = [each for each in layers if hasattr(each, "output_slices")]
    ends = [each for each in layers if each not in linear]
    ids = [0, *(lora_id for lora_id in manager.lora_index_to_id if lora_id)]
    results = []

    def counted():
        return sum(calls(worker).values())

    for kind, times in ((linear, number), (ends, number // 3)):
        found = {"skipped": 0, "different": 0, "touched": 0}
        for _ in range(times):
            some = picked.sample(ids, picked.randint(1, len(ids)))
            requests = picked.choices(some, k=picked.randint(1, 8))
            tokens = tuple(each for each in requests for _ in range(picked.randint(1, PIECE // 8)))
            layer = picked.choice(kind)
            wrapper = layer.punica_wrapper
            mapping = LoRAMapping(tokens, tuple(requests), is_prefill=True)
            index = manager.lora_index_to_id
            wrapper.update_metadata(mapping, index, SLOTS + 1, manager.vocab_size)
            result = both_ways(layer, tokens, requests, numbers, counted)
            found = {what: found[what] + result[what] for what in found}
        results.append(found)
    manager._last_mapping = None
    return results


def both_ways(layer, tokens, requests, numbers, counted, dtype=None):
    """Run a layer's operation on random numbers as installed and as vLLM defines it.

    Returns whether it skipped something, differed, or changed rows of base-model requests.
    `counted()` returns the number of operations on weights since its last call.
    """
    import torch

    wrapper = layer.punica_wrapper
    op, rows, width, out, rest = _operation(layer, tokens, requests)
    x, y = (
        torch.randn(len(rows), n, generator=numbers).to(dtype or torch.float32)
        for n in (width, out)
    )
    ours, theirs = y.clone(), y.clone()
    counted()
    getattr(wrapper, op)(ours, x.clone(), *rest)
    some = counted()
    getattr(type(wrapper), op)(wrapper, theirs, x, *rest)
    base = torch.tensor(rows) == 0
    return {
        "skipped": some < counted(),
        "different": not torch.equal(ours, theirs),
        "touched": not torch.equal(ours[base], y[base]),
    }


def _operation(layer, tokens, requests):
    """A layer's operation: name, adapter of each row, widths of x and y, further arguments."""
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    if hasattr(layer, "output_slices"):
        more = a, b, 1.0, layer.output_slices
        return OPS[0], tokens, a[0].shape[-1], sum(layer.output_slices), more
    if hasattr(layer, "lora_a_stacked_2d"):
        return OPS[1], tokens, b.shape[-1], b.shape[-2], (b,)
    return OPS[2], requests, a.shape[-1], b.shape[-2], (a, b, 1.0)


@dataclass
class Engine:
    """A real engine and the requests sent to it."""

    model: str
    workers: int
    folders: list[Path]

    def __post_init__(self):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.llm = LLM(
            self.model, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
            max_lora_rank=16, max_loras=SLOTS, max_cpu_loras=SLOTS + 1, max_num_seqs=8, seed=0,
            max_num_batched_tokens=PIECE, enable_chunked_prefill=True, enable_prefix_caching=True,
            tensor_parallel_size=self.workers,
            distributed_executor_backend="mp" if self.workers > 1 else ONE_PROCESS,
        )  # fmt: skip
        self.adapters = [LoRARequest(f.name, i, str(f)) for i, f in enumerate(self.folders, 1)]

    def generate(self, prompts, adapters, tokens):
        """Log-probabilities by token at each position, for every request of a batch."""
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=n, temperature=0, logprobs=3) for n in tokens]
        out = self.llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        return [
            [{t: v.logprob for t, v in position.items()} for position in one.outputs[0].logprobs]
            for one in out
        ]

    def all(self, method, *args):
        """The answers of all workers."""
        return self.llm.collective_rpc(method, args=args)

    def each_pass(self, adapter):
        """Slices and ends of one forward pass for one request, in every worker."""
        self.generate([PROMPT.format("Peru")], [adapter], [1])  # loads it into a slot
        self.all(calls)
        self.generate(["Q: What of " + adapter.lora_name if adapter else "Q:"], [adapter], [3])
        return [
            [found[what] / found["passes"] for what in ("slices", "ends")]
            for found in self.all(calls)
        ]

    def random_batches(self):
        """Run each batch with and without skipping, in random order: differences and counts."""
        picked, differences = random.Random(3), []
        slices = {True: 0, False: 0}
        passes = 0
        for number in range(ROUNDS):
            size = picked.randint(1, 7)
            prompts = [
                " ".join(PROMPT.format(picked.choice(list(CAPITALS))) for _ in range(repeated))
                for repeated in (picked.randint(1, 6) for _ in range(size))
            ]
            adapters = [picked.choice([None, *self.adapters]) for _ in range(size)]
            tokens = [picked.randint(1, 6) for _ in range(size)]
            if number % 6 == 5:
                adapters[0] = self.changed(picked)
            reset_cache, answers = picked.random() < 0.7, {}
            for on in picked.sample([True, False], 2):
                self.all(switch, on)
                if reset_cache:
                    assert self.llm.reset_prefix_cache()
                self.all(calls)
                answers[on] = self.generate(prompts, adapters, tokens)
                found = self.all(calls)[0]
                slices[on] += found["slices"]
                passes += found["passes"]
            differences.append(_difference(answers[True], answers[False]))
        self.all(switch, True)
        return {"differences": differences, "slices": list(slices.values()), "passes": passes}

    def changed(self, picked):
        """Replace the last adapter's folder by another's content; a request to reload it."""
        from vllm.lora.request import LoRARequest

        last = self.folders[-1]
        shutil.rmtree(last)
        shutil.copytree(picked.choice(self.folders[:-2]), last)
        self.adapters[-1] = LoRARequest(last.name, len(self.folders), str(last))
        return LoRARequest(last.name, len(self.folders), str(last), load_inplace=True)


def _difference(ours, theirs):
    """The largest difference between log-probabilities of the same tokens."""
    pairs = [
        (position[token], other.get(token, float("-inf")))
        for one, two in zip(ours, theirs, strict=True)
        for position, other in zip(one, two, strict=True)
        for token in position
    ]
    return max(abs(a - b) for a, b in pairs)


def main():
    """Start the engine, run all checks and print the result."""
    model, workers, *folders = sys.argv[1:]
    engine = Engine(model, int(workers), [Path(folder) for folder in folders])
    found = {"skips": engine.all(switch, True)}
    engine.all(calls)
    found["each pass"] = {
        adapter.lora_name if adapter else "base": engine.each_pass(adapter)
        for adapter in [None, *engine.adapters]
    }
    if all(found["skips"]):
        found["batches"] = engine.random_batches()
        found["operations"] = engine.all(operations, 5, OPERATIONS)
    print_result(found)


if __name__ == "__main__":
    main()
