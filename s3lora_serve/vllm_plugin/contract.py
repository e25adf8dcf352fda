"""The names and signatures in vLLM that the gate and skipping rely on, checked at start.

A vLLM that lacks one that the gate needs does not start. Skipping is switched off instead.
"""

import dataclasses
import dis
import inspect
from typing import Any

from s3lora_serve.errors import ContractBroken
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.compat import (
    AsyncLLM,
    AsyncMPClient,
    EngineCore,
    FilesystemResolver,
    HfHubResolver,
    LLMEngine,
    LoRALayerWeights,
    LoRAModel,
    LoRAModelManager,
    LoRAModelRunnerMixin,
    LoRARequest,
    LRUCacheWorkerLoRAManager,
    OpenAIServingModels,
    OutputProcessor,
    PEFTHelper,
    PunicaWrapperBase,
    PunicaWrapperCPU,
    WeightsMapper,
    WorkerLoRAManager,
    kv_cache_utils,
    lora_ops,
)

_BGMV_SHRINK = ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling")
_LORA_LINEAR = (
    *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    *("buffer", "kwargs"),
)
_LORA_LOGITS = ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs")
_LORA_EMBEDDING = ("self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs")
_UPDATE_METADATA = ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs")
_FIND = ("self", "lora_name", "lora_path", "base_model_name")
_Contract = tuple[tuple[Any, str, tuple[str, ...]], ...]
_CONTRACT: _Contract = (
    (WorkerLoRAManager, "_load_adapter", ("self", "lora_request")),
    (WorkerLoRAManager, "add_adapter", ("self", "adapter_request")),
    (LRUCacheWorkerLoRAManager, "add_adapter", ("self", "lora_request")),
    (WorkerLoRAManager, "create_lora_manager", ("self", "model", "vllm_config")),
    (LRUCacheWorkerLoRAManager, "create_lora_manager", ("self", "model", "vllm_config")),
    (LoRAModelManager, "activate_adapter", ("self", "lora_id")),
    (LoRAModelManager, "add_adapter", ("self", "adapter")),
    (LoRAModelRunnerMixin, "remove_lora", ("self", "lora_id")),
    (AsyncLLM, "add_lora", ("self", "lora_request")),
    (AsyncLLM, "remove_lora", ("self", "lora_id")),
    (AsyncMPClient, "_call_utility_async", ("self", "method", "args", "engine")),
    (OpenAIServingModels, "load_lora_adapter", ("self", "request", "base_model_name")),
    (OpenAIServingModels, "unload_lora_adapter", ("self", "request")),
    (OpenAIServingModels, "init_static_loras", ("self",)),
    (OpenAIServingModels, "resolve_lora", ("self", "lora_name")),
    (OpenAIServingModels, "show_available_models", ("self",)),
    (FilesystemResolver, "_get_lora_req_from_path", _FIND),
    (HfHubResolver, "resolve_lora", ("self", "base_model_name", "lora_name")),
    (lora_ops, "bgmv_shrink", _BGMV_SHRINK),
    (PunicaWrapperCPU, "add_shrink", ("self", "y", "x", "lora_a_stacked", "scale", "kwargs")),
    (PunicaWrapperCPU, "add_lora_embedding", _LORA_EMBEDDING),
    (PunicaWrapperBase, "update_metadata", _UPDATE_METADATA),
    (kv_cache_utils, "_gen_lora_extra_hash_keys", ("request",)),
)
_ATTRIBUTES = (
    (WorkerLoRAManager, "_adapter_manager"),
    (LRUCacheWorkerLoRAManager, "_adapter_manager"),
    (LoRAModelManager, "packed_modules"),
    (LoRAModelManager, "modules"),
    (LoRAModelManager, "model"),
    (AsyncMPClient, "core_engines"),
    (AsyncMPClient, "client_index"),
    (AsyncMPClient, "resources"),
    (AsyncLLM, "engine_core"),
    (AsyncLLM, "output_processor"),
    (AsyncLLM, "errored"),
    (OutputProcessor, "request_states"),
)
"""Attributes of instances that `compat.py` reads."""

_ADD_REQUEST = ("self", "request_id", "prompt", "params", "arrival_time", "lora_request")


def check_contract() -> None:
    """Check the names and signatures that the gate relies on.

    Raises:
        ContractBroken: a name is missing or has other parameters.
    """
    if problem := _deviation(_CONTRACT):
        broken(problem)
    for owner, name in _ATTRIBUTES:
        if not _has_attribute(owner, name):
            broken(f"{owner.__name__} sets no {name}")
    if "_load_adapter" in vars(LRUCacheWorkerLoRAManager):
        broken("LRUCacheWorkerLoRAManager has a _load_adapter of its own")
    for name in ("lora_a", "lora_b", "scaling"):
        if name not in inspect.signature(LoRALayerWeights.__init__).parameters:
            broken(f"LoRALayerWeights takes no {name}")
    if "loras" not in inspect.signature(LoRAModel.__init__).parameters:
        broken("LoRAModel takes no loras")
    found = tuple(inspect.signature(LLMEngine.add_request).parameters)
    if found[: len(_ADD_REQUEST)] != _ADD_REQUEST:
        broken(f"LLMEngine.add_request takes {found}, expected {_ADD_REQUEST} first")
    if not {"lora_name", "lora_path", "lora_int_id"} <= set(LoRARequest.__struct_fields__):
        broken(f"LoRARequest has the fields {LoRARequest.__struct_fields__}")
    if not {"get_rename_mapper", "get_unstacked_mapper"} & set(vars(WeightsMapper)):
        broken("WeightsMapper has no get_rename_mapper")


def check_model_runners() -> None:
    """Check that model runners, V1's or V2's, load adapters by the methods that the gate replaces.

    V2 differs in how it batches requests and picks graphs, which the gate leaves alone.

    Raises:
        ContractBroken: one loads or removes adapters by methods of its own.
    """
    for runner in compat.model_runners():
        for name in ("load_lora_model", "remove_lora"):
            if getattr(runner, name, None) is not getattr(LoRAModelRunnerMixin, name):
                broken(f"{runner.__module__}.GPUModelRunner has a {name} of its own")


def _deviation(contract: _Contract) -> str | None:
    """The first name that is missing or takes other parameters, in words; None if all fit."""
    for owner, name, expected in contract:
        method = getattr(owner, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != expected:
            return f"{owner.__name__}.{name} takes {found}, expected {expected}"
    return None


def _has_attribute(owner: Any, name: str) -> bool:
    """Whether a class has an attribute, or one of its methods sets it on an instance."""
    if hasattr(owner, name):
        return True
    methods = (m for base in owner.__mro__ for m in vars(base).values() if inspect.isfunction(m))
    return any(
        step.opname == "STORE_ATTR" and step.argval == name
        for method in methods
        for step in dis.get_instructions(inspect.unwrap(method))
    )


def matches_patterns() -> bool:
    """Whether this vLLM has the pattern search that rank_alpha_matching.py replaces.

    Versions before 0.32 ignore rank_pattern and alpha_pattern.
    """
    return _deviation(((PEFTHelper, "_match_pattern", ("pattern", "name")),)) is None


def skipping_obstacle(manager: Any = None) -> str | None:
    """Why operations without weights cannot be skipped by this vLLM or worker; None if they can.

    The gate itself relies on none of the names checked here.
    """
    try:
        layers, mapping, on_gpu = compat.skipping_classes()
    except ImportError as error:
        return f"vLLM {compat.installed_version()}: {error}"
    expand = ("self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs")
    wrappers = (PunicaWrapperCPU, on_gpu)
    contract = [
        *((layer, "set_lora", ("self", "index", "lora_a", "lora_b")) for layer in layers),
        *((layer, "reset_lora", ("self", "index")) for layer in layers),
        (WorkerLoRAManager, "dummy_lora_cache", ("self",)),
        (on_gpu, "update_metadata", _UPDATE_METADATA),
        *((owner, "add_lora_linear", _LORA_LINEAR) for owner in wrappers),
        *((owner, "add_lora_embedding", _LORA_EMBEDDING) for owner in wrappers),
        *((owner, "add_lora_logits", _LORA_LOGITS) for owner in wrappers),
        *((owner, "add_expand", (*expand, "kwargs")) for owner in wrappers),
    ]
    if problem := _deviation(tuple(contract)):
        return f"vLLM {compat.installed_version()}: {problem}"
    if "index_mapping" not in inspect.get_annotations(mapping):
        return f"vLLM {compat.installed_version()}: LoRAMapping has no index_mapping"
    if manager is None:
        return None
    if not hasattr(manager, "_cached_dummy_lora"):
        return f"vLLM {compat.installed_version()}: WorkerLoRAManager has no _cached_dummy_lora"
    known = compat.known_layers(manager)
    others = {type(each.punica_wrapper) for each in known} - set(wrappers)
    return f"unknown operations: {others}" if others else None


def captured_skipping_obstacle(manager: Any, vllm_config: Any) -> str | None:
    """Why captured graphs cannot skip in this vLLM or worker; None if they can.

    See `skipping_obstacle` for the rest.
    """
    release = f"vLLM {compat.installed_version()}"
    if not isinstance(getattr(vllm_config, "additional_config", None), dict):
        return f"{release}: additional_config is no dict, which would mark the compiled graphs"
    if getattr(compat.lora_manager(manager), "supports_mm", True):
        return "models of several modalities compile parts with configurations of their own"
    if not compat.uses_gpu_operations(manager):
        return "LoRA operations of this platform do not end early"
    for layer in compat.known_layers(manager):
        for name in compat.MAPPING_METADATA:
            metadata = getattr(layer.punica_wrapper, name, None)
            if not dataclasses.is_dataclass(metadata) or not hasattr(metadata, "active_lora_ids"):
                return f"{release}: PunicaWrapperGPU.{name} has no active_lora_ids"
    found = compat.lora_manager(manager)
    missing = [n for n in ("activate_adapter", "lora_index_to_id") if not hasattr(found, n)]
    return f"{release}: LoRAModelManager has no {missing[0]}" if missing else None


def base_requests_obstacle() -> str | None:
    """Why the engine cannot take requests without effect as the base model's; None if it can."""
    problem = _deviation(((EngineCore, "preprocess_add_request", ("self", "request")),))
    return f"vLLM {compat.installed_version()}: {problem}" if problem else None


def broken(problem: str) -> None:
    """Raise ContractBroken with the installed vLLM version.

    Raises:
        ContractBroken: always.
    """
    raise ContractBroken(f"vLLM {compat.installed_version()}: {problem}")
