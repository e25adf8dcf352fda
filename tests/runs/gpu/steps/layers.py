"""Step 4: LoRA of 128 linear layers of an 8B shape in one CUDA graph, by what adapters hold.

vLLM's own layers and kernels, as stock vLLM calls them and with the gate's rows of active ids.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from tests.runs.gpu.steps import DEVICE, ON_GPU, show
from tests.support.triton_interpreter import enable_triton

LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, HEAD = 32, 4096, 14336, 32, 8, 128
SMALL = (1, 64, 96, 4, 2, 16)
SLOTS, RANK = 4, 16
BATCHES = (1, 8, 32)
REPLAYS = 200
UPDATES = 100


def make_layers(config: Any) -> list[Any]:
    """LoRA layers qkv, o, gate_up and down of each layer, without weights in their slots."""
    from vllm.lora import layers as lora
    from vllm.model_executor.layers import linear

    count, hidden, inner, heads, key_heads, head = (
        (LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, HEAD) if ON_GPU else SMALL
    )
    more: dict[str, Any] = {"bias": False, "params_dtype": config.lora_dtype}
    found: list[Any] = []
    for _ in range(count):
        qkv = linear.QKVParallelLinear(hidden, head, heads, key_heads, **more)
        output = linear.RowParallelLinear(heads * head, hidden, **more)
        gate_up = linear.MergedColumnParallelLinear(hidden, [inner, inner], **more)
        down = linear.RowParallelLinear(inner, hidden, **more)
        found += [
            lora.MergedQKVParallelLinearWithLoRA(qkv),
            lora.RowParallelLinearWithLoRA(output),
            lora.MergedColumnParallelLinearWithLoRA(gate_up),
            lora.RowParallelLinearWithLoRA(down),
        ]
    for layer in found:
        layer.create_lora_weights(SLOTS, config, None)
    return found


def fill(layers: list[Any], share: float) -> None:
    """Put random weights into slot 0 of a share of the layers; the others hold none."""
    picked = random.Random(5)
    held = set(picked.sample(range(len(layers)), round(share * len(layers))))
    for i, layer in enumerate(layers):
        if i not in held:
            layer.reset_lora(0)
            continue
        width, dtype = layer.lora_a_stacked[0].shape[-1], layer.lora_a_stacked[0].dtype
        sides = [
            (torch.randn(RANK, width, dtype=dtype), torch.randn(out, RANK, dtype=dtype))
            for out in layer.output_slices
        ]
        a, b = [side[0] for side in sides], [side[1] for side in sides]
        layer.set_lora(0, *((a, b) if len(sides) > 1 else (a[0], b[0])))


def step(layers: list[Any], inputs: dict[Any, torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """One pass of all LoRA operations."""
    for layer, y in zip(layers, outputs, strict=True):
        x = inputs[layer.lora_a_stacked[0].shape[-1]]
        layer.punica_wrapper.add_lora_linear(
            y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices
        )


def milliseconds(layers: list[Any], batch: int) -> float:
    """Median of a captured graph's replays."""
    dtype = layers[0].lora_a_stacked[0].dtype
    widths = {layer.lora_a_stacked[0].shape[-1] for layer in layers}
    inputs = {width: torch.randn(batch, width, dtype=dtype, device=DEVICE) for width in widths}
    outputs = [
        torch.zeros(batch, sum(layer.output_slices), dtype=dtype, device=DEVICE) for layer in layers
    ]
    step(layers, inputs, outputs)
    if not ON_GPU:
        return 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layers, inputs, outputs)
    times = []
    for _ in range(REPLAYS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def host_microseconds(update: Callable[[], object]) -> float:
    """Median time of the host for one update of a batch's metadata, without the device's."""
    times = []
    for _ in range(UPDATES):
        started = time.perf_counter()
        update()
        times.append(1e6 * (time.perf_counter() - started))
        if ON_GPU:
            torch.cuda.synchronize()
    return statistics.median(times)


def measure(kind: str, share: float, found: dict[str, Any], host: dict[str, float]) -> None:
    """All batches with `share` of the layers held; `rows`: with the gate's rows."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper import punica_gpu

    from s3lora_serve.vllm_plugin.engine import captured_skipping

    dtype = torch.bfloat16 if ON_GPU else torch.float16
    config = LoRAConfig(max_loras=SLOTS, max_lora_rank=RANK, lora_dtype=dtype)
    wrapper = punica_gpu.PunicaWrapperGPU(64, 32, DEVICE, lora_config=config)
    layers = make_layers(config)
    for layer in layers:
        layer.set_mapping(wrapper)
    adapters = SimpleNamespace(
        modules={str(i): layer for i, layer in enumerate(layers)},
        lora_index_to_id=[1, None, None, None], activate_adapter=bool,
    )  # fmt: skip
    manager = SimpleNamespace(_adapter_manager=adapters, _cached_dummy_lora=False)
    if kind == "rows":
        captured_skipping.install(manager, SimpleNamespace(additional_config={}), layers)
    fill(layers, share)
    for batch in BATCHES if ON_GPU else BATCHES[:1]:
        mapping = LoRAMapping((1,) * batch, (1,) * batch, is_prefill=False)
        arguments = (mapping, adapters.lora_index_to_id, SLOTS + 1, 1000)
        name = f"{kind}, {share:.0%} held"
        host[name] = host_microseconds(partial(wrapper.update_metadata, *arguments))
        found.setdefault(name, {})[str(batch)] = milliseconds(layers, batch)
        show({"milliseconds": found, "host microseconds": host})


def main() -> None:
    """Stock vLLM with weights everywhere, then the gate's rows with fewer and fewer."""
    if not ON_GPU:
        enable_triton()
    from vllm.config import set_current_vllm_config
    from vllm.config.vllm import VllmConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if ON_GPU else "gloo"
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, backend)
        initialize_model_parallel(1, 1)
        torch.set_default_device(DEVICE)
        found: dict[str, Any] = {}
        host: dict[str, float] = {}
        for kind, share in (("stock", 1.0), ("rows", 1.0), ("rows", 0.7), ("rows", 0.0)):
            measure(kind, share, found, host)


if __name__ == "__main__":
    main()
