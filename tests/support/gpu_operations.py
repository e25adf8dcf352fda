"""`python -m tests.support.gpu_operations MODEL NUMBER`: vLLM's GPU operations in Triton's
interpreter, on random weights and batches, with slices without weights skipped and not skipped.

The layers, the wrapper and its kernels are vLLM's own. The result is printed as JSON.
"""

import os
import random
import sys
import tempfile
from types import SimpleNamespace

import torch

from tests.support.programs import print_result
from tests.support.random_batches import both_ways
from tests.support.triton_interpreter import enable_triton

SLOTS, RANK, WIDTH, INNER, WORDS = 3, 16, 64, 96, 128
IDS = list(range(1, SLOTS + 1))
DTYPE = torch.float16  # the interpreter reads the bits of bfloat16 as integers


def layers(config):
    """One LoRA layer of each kind that skipping supports, including packed ones."""
    from vllm.lora import layers as lora
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    more = {"bias": False, "params_dtype": DTYPE}
    qkv = linear.QKVParallelLinear(WIDTH, 16, 4, 2, **more)
    gate_up = linear.MergedColumnParallelLinear(WIDTH, [INNER, INNER], **more)
    down = linear.RowParallelLinear(INNER, WIDTH, **more)
    embedding = VocabParallelEmbedding(WORDS, WIDTH, params_dtype=DTYPE)
    found = {
        "qkv_proj": lora.MergedQKVParallelLinearWithLoRA(qkv),
        "gate_up_proj": lora.MergedColumnParallelLinearWithLoRA(gate_up),
        "down_proj": lora.RowParallelLinearWithLoRA(down),
        "embed_tokens": lora.VocabParallelEmbeddingWithLoRA(embedding),
        "logits": lora.LogitsProcessorWithLoRA(
            LogitsProcessor(WORDS), WIDTH, DTYPE, torch.device("cpu"), None
        ),
    }
    for layer in found.values():
        layer.create_lora_weights(SLOTS, config, None)
    return found


def weights(layer, picked, numbers):
    """Factors for a slot; in packed layers some are missing or zero."""

    def factor(*shape):
        return torch.randn(shape, generator=numbers).to(DTYPE)

    if not hasattr(layer, "output_slices"):
        if hasattr(layer, "lora_a_stacked_2d"):
            return factor(RANK, WORDS), factor(WIDTH, RANK)
        return factor(RANK, WIDTH), factor(WORDS, RANK)
    width = layer.lora_a_stacked[0].shape[-1]
    sides = [(factor(RANK, width), factor(out, RANK)) for out in layer.output_slices]
    if len(sides) == 1:
        return sides[0]
    kinds = picked.choices(["whole", "missing", "zero"], k=len(sides))
    return tuple(
        [None if kind == "missing" else side[i] * (kind != "zero" or i == 0)
         for side, kind in zip(sides, kinds, strict=True)]
        for i in range(2)
    )  # fmt: skip


def prepared(model):
    """An engine's configuration, layers of each kind, and vLLM's GPU wrapper, on the CPU."""
    from vllm.config import set_current_vllm_config
    from vllm.config.lora import LoRAConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    eager = EngineArgs(model, dtype="float16", max_model_len=64, enforce_eager=True)
    vllm_config = eager.create_engine_config()
    config = LoRAConfig(max_loras=SLOTS, max_lora_rank=RANK, lora_dtype=DTYPE)
    wrapper = PunicaWrapperGPU(64, 8, "cpu", lora_config=config)
    with set_current_vllm_config(vllm_config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        modules = layers(config)
    for layer in modules.values():
        layer.set_mapping(wrapper)
    return vllm_config, modules, wrapper


def random_batch(picked):
    """The adapters (0: none) of some requests, and of each of their tokens."""
    requests = picked.choices(range(SLOTS + 1), k=picked.randint(1, 4))
    return requests, tuple(each for each in requests for _ in range(picked.randint(1, 4)))


def update_metadata(wrapper, requests, tokens):
    """Tell the wrapper of a batch, as vLLM does before a step."""
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(tokens, tuple(requests), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, WORDS)


def main():
    """Change slots and batches at random and run each operation with and without skipping."""
    enable_triton()
    os.environ["VLLM_BATCH_INVARIANT"] = "1"  # one partial sum instead of 64 to interpret
    from vllm.lora.punica_wrapper import punica_gpu

    from s3lora_serve.vllm_plugin.engine.skipping import Skipping

    model, number = sys.argv[1], int(sys.argv[2])
    vllm_config, modules, wrapper = prepared(model)
    manager = SimpleNamespace(
        _adapter_manager=SimpleNamespace(modules=modules), _cached_dummy_lora=False
    )
    Skipping(wanted=True).activate(manager, vllm_config)
    slices = []
    expand = punica_gpu.lora_expand
    punica_gpu.lora_expand = lambda x, stacked, *more, **named: (
        slices.append(len(stacked)), expand(x, stacked, *more, **named)
    )[1]  # fmt: skip

    def counted():
        total = sum(slices)
        slices.clear()
        return total

    picked, numbers = random.Random(7), torch.Generator().manual_seed(7)
    for layer in modules.values():
        for slot in range(SLOTS):
            layer.reset_lora(slot)
            if hasattr(layer, "output_slices"):
                layer.set_lora(slot, *weights(layer, picked, numbers))
    frequency = [len(getattr(layer, "output_slices", (0,))) for layer in modules.values()]
    found = {name: {"skipped": 0, "different": 0, "touched": 0} for name in modules}
    for _ in range(number):
        [(name, layer)] = picked.choices(list(modules.items()), frequency)
        slot = picked.randrange(SLOTS)
        if picked.random() < 0.6:
            layer.set_lora(slot, *weights(layer, picked, numbers))
        else:
            layer.reset_lora(slot)
        requests, tokens = random_batch(picked)
        update_metadata(wrapper, requests, tokens)
        result = both_ways(layer, tokens, requests, numbers, counted, DTYPE)
        found[name] = {what: found[name][what] + result[what] for what in result}
    print_result(found)


if __name__ == "__main__":
    main()
