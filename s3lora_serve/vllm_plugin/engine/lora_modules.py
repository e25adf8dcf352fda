"""The served model's LoRA modules: their names in vLLM, shapes, layers and projections."""

from dataclasses import dataclass, field
from typing import Any

from s3lora_serve.telemetry.per_adapter_gauge import OTHER
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.model_modules import ModelModules


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """The part of the model that one worker serves; empty until its LoRA modules exist."""

    manager: Any = None  # vLLM's WorkerLoRAManager
    base_model: str | None = None  # as the operator named it
    places: frozenset[tuple[str, str]] = frozenset()  # (layer, projection)
    modules: ModelModules = field(default_factory=ModelModules)

    @classmethod
    def of(cls, manager: Any, vllm_config: Any) -> "WorkerModel":
        """The model of a worker whose LoRA modules have just been created."""
        stacked = stacked_experts(manager)
        taken = {name: (m, n) for name, (m, n, count) in stacked.items() if count}
        shapes = module_shapes(manager) | taken
        mapper = compat.rename_mapper(compat.lora_manager(manager).model)
        is_whole = bool(vllm_config.parallel_config.pipeline_parallel_size == 1)
        return cls(
            manager,
            compat.base_model(vllm_config),
            frozenset(_place(name) for name in shapes),
            ModelModules(
                shapes,
                mapper,
                is_whole,
                skipped=compat.skipped_prefixes(manager),
                pools=compat.is_pooling_model(manager),
                experts={name: count for name, (_, _, count) in stacked.items()},
            ),
        )


def _place(name: str) -> tuple[str, str]:
    """(layer, projection) of a module of the base model."""
    parts = name.split(".")
    return next((part for part in parts if part.isdecimal()), OTHER), parts[-1]


def module_shapes(manager: Any) -> dict[str, tuple[int, int]]:
    """(m, n) of ΔW, unsharded, for every module that can have a LoRA, by vLLM's names.

    Packed layers (qkv_proj) appear as their parts (q_proj, k_proj, v_proj). Layers of unknown shape
    are left out, so that adapters for them are refused.
    """
    adapter_manager = compat.lora_manager(manager)
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in adapter_manager.modules.items():
        parts = compat.packed_modules(adapter_manager).get(name, [name])
        if hasattr(layer, "moe_config"):
            shapes |= _expert_shapes(adapter_manager.model, layer, parts)
            continue
        outputs, inputs = _layer_sizes(layer)
        if len(parts) == 1 and outputs:
            shapes[name] = sum(outputs), inputs
        elif len(outputs) >= len(parts):
            sizes = _sizes_of_parts(outputs, len(parts))
            shapes |= {part: (m, inputs) for part, m in zip(parts, sizes, strict=True)}
    return shapes


def _sizes_of_parts(outputs: list[int], count: int) -> list[int]:
    """Output sizes of the parts of a packed layer that has more slices than parts.

    The first part covers all slices that the others leave, each of which has one, as `in_proj_qkv`
    beside `in_proj_z` does. Source: vLLM, `MergedColumnParallelLinearWithLoRA.expand_packed_lora`.
    """
    covered = len(outputs) - count + 1
    return [sum(outputs[:covered]), *outputs[covered:]]


def _expert_shapes(model: Any, layer: Any, parts: list[str]) -> dict[str, tuple[int, int]]:
    """(m, n) of each expert's projections, for adapters that hold experts one by one."""
    mapping = compat.get_moe_expert_mapping(model)
    if len(parts) != len(mapping):
        return {}  # vLLM takes experts in one tensor
    hidden, inner = _expert_sizes(layer)
    shapes = {}
    for part, (_, _, _, shard) in zip(parts, mapping, strict=True):
        shapes[part] = (hidden, inner) if shard == "w2" else (inner, hidden)
    return shapes


def stacked_experts(manager: Any) -> dict[str, tuple[int, int, int]]:
    """(m, n) of one expert and the number of experts, 0 if vLLM takes them one by one alone.

    By vLLM's names of a layer's two pairs of factors, of gate_up_proj and of down_proj, for
    adapters with experts in one tensor.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for name, layer in compat.lora_manager(manager).modules.items():
        if hasattr(layer, "moe_config"):
            hidden, inner = _expert_sizes(layer)
            takes = compat.takes_stacked_experts(manager, layer)
            count = layer.moe_config.num_experts if takes else 0
            found[f"{name}.base_layer"] = 2 * inner, hidden, count
            found[name] = hidden, inner, count
    return found


def _expert_sizes(layer: Any) -> tuple[int, int]:
    """Width of a layer's inputs and of each expert's inside, as the checkpoint has them.

    vLLM pads both for some kernels.
    """
    config = layer.moe_config
    hidden = getattr(config, "hidden_dim_unpadded", None) or layer.hidden_size
    inner = getattr(config, "intermediate_size_per_partition_unpadded", None)
    return hidden, (inner or layer.intermediate_size_per_partition) * layer.tp_size


def module_of(key: str) -> str:
    """The last part of the module name that a tensor belongs to, which vLLM never renames."""
    parts = key.split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return parts[cut - 1] if cut else key


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
