"""What the served model and vLLM's LoRA manager hold: modules, their shapes and names, adapters."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from s3lora_serve.served_gauge import OTHER
from s3lora_serve.vllm_plugin import compat

INERT = "s3lora.inert"
"""Name of the one entry of an adapter without effect. No module has it, so every LoRA slot of the
adapter is reset; without any entry vLLM's packing step stops the engine."""


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """What one worker serves; empty until it has its LoRA modules."""

    manager: Any = None  # vLLM's WorkerLoRAManager
    base_model: str | None = None  # as the operator named it
    places: frozenset[tuple[str, str]] = frozenset()  # (layer, projection)
    shapes: frozenset[tuple[int, int]] = frozenset()  # (m, n) of ΔW
    whole: bool = False  # one worker in a row of pipeline stages has a part of the layers

    @classmethod
    def of(cls, manager: Any, vllm_config: Any) -> "WorkerModel":
        """The model of a worker that has just made its LoRA modules."""
        shapes = module_shapes(manager)
        return cls(
            manager,
            compat.base_model(vllm_config),
            frozenset(_place(name) for name in shapes),
            frozenset(shapes.values()),
            holds_whole_model(manager),
        )


def _place(name: str) -> tuple[str, str]:
    """(layer, projection) of a module of the base model."""
    parts = name.split(".")
    return next((part for part in parts if part.isdecimal()), OTHER), parts[-1]


def served_names(manager: Any, keys: Iterable[str]) -> dict[str, str]:
    """vLLM's module name for each tensor name of an adapter (models may rename modules).

    Raises:
        ValueError: vLLM cannot map a name.
    """
    mapper = compat.rename_mapper(manager._adapter_manager.model)
    return {key: compat.parse_fine_tuned_lora_name(key, mapper)[0] for key in keys}


def module_shapes(manager: Any) -> dict[str, tuple[int, int]]:
    """(m, n) of ΔW for every module that vLLM can put a LoRA on, unsharded, by vLLM's names.

    Packed layers (qkv_proj) appear as their parts (q_proj, k_proj, v_proj). Layers whose shape is
    not known here are left out, so that adapters for them are refused.
    """
    adapter_manager = manager._adapter_manager
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in adapter_manager.modules.items():
        parts = adapter_manager.packed_modules.get(name, [name])
        if hasattr(layer, "moe_config"):
            shapes |= _expert_shapes(adapter_manager.model, layer, parts)
            continue
        outputs, inputs = _layer_sizes(layer)
        if len(parts) == 1 and outputs:
            shapes[name] = sum(outputs), inputs
        elif len(parts) == len(outputs):
            shapes |= {part: (m, inputs) for part, m in zip(parts, outputs, strict=True)}
    return shapes


def _expert_shapes(model: Any, layer: Any, parts: list[str]) -> dict[str, tuple[int, int]]:
    """(m, n) of each expert's projections, where adapters hold experts one by one."""
    mapping = compat.get_moe_expert_mapping(model)
    if len(parts) != len(mapping):
        return {}  # experts fused into one tensor
    hidden = layer.hidden_size
    inner = layer.intermediate_size_per_partition * layer.tp_size
    shapes = {}
    for part, (_, _, _, shard) in zip(parts, mapping, strict=True):
        shapes[part] = (hidden, inner) if shard == "w2" else (inner, hidden)
    return shapes


def holds_whole_model(manager: Any) -> bool:
    """Whether this worker has every layer; with pipeline stages each has its own."""
    parallel = manager._s3lora_vllm_config.parallel_config
    return bool(parallel.pipeline_parallel_size == 1)


def module_of(key: str) -> str:
    """The module that a tensor of an adapter belongs to, by the name's end that is never mapped."""
    parts = key.split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return parts[cut - 1] if cut else key


def strip_module(lora: Any, name: str) -> None:
    """Take away one module's update.

    Experts are packed together and none may be missing, so one alone is left with B = 0.
    """
    if ".experts." not in name:
        lora.loras.pop(name, None)
    elif name in lora.loras:
        lora.loras[name].lora_b = torch.zeros_like(lora.loras[name].lora_b)


def drop_full_modules(lora: Any) -> None:
    """Take away whole layers that an adapter brings (modules_to_save)."""
    if getattr(lora, "modules_to_save", None):
        lora.modules_to_save = {}


def _layer_sizes(layer: Any) -> tuple[list[int], int]:
    """Unsharded output sizes of a layer's slices, and its input size; ([], 0) if not known."""
    base = layer.base_layer
    if hasattr(base, "total_num_heads"):  # QKVParallelLinear; output_sizes repeats shared kv heads
        values = getattr(base, "v_head_size", base.head_size)
        heads, kv_heads = base.total_num_heads, base.total_num_kv_heads
        sizes = [heads * base.head_size, kv_heads * base.head_size, kv_heads * values]
        return sizes, base.input_size
    if hasattr(base, "input_size") and hasattr(base, "output_size"):
        return list(getattr(base, "output_sizes", [base.output_size])), base.input_size
    if hasattr(layer, "hidden_size") and hasattr(base, "vocab_size"):  # lm_head
        return [base.vocab_size], layer.hidden_size
    return [], 0


def make_inert(lora: Any) -> None:
    """Leave one entry that no module uses: the adapter then serves exactly the base model."""
    nothing = torch.zeros(1, 1)
    lora.loras[INERT] = compat.LoRALayerWeights(INERT, 1, 1, nothing, nothing.clone(), scaling=1.0)


def inert_adapter(request: Any) -> Any:
    """An adapter without effect, under the id that was asked for."""
    lora = compat.LoRAModel(request.lora_int_id, 1, {})
    make_inert(lora)
    return lora


def add_loaded(manager: Any, lora: Any) -> bool:
    """Add and activate an adapter that is loaded, as vLLM's own `add_adapter` does."""
    adapters = manager._adapter_manager
    if len(adapters) + 1 > adapters.capacity and hasattr(adapters, "remove_oldest_adapter"):
        adapters.remove_oldest_adapter()
    added: bool = adapters.add_adapter(lora)
    adapters.activate_adapter(lora.id)
    return added
