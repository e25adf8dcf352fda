"""Every import from vLLM, and the differences between its versions 0.28 to 0.33."""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from vllm.entrypoints.openai.models.serving import OpenAIServingModels as OpenAIServingModels
from vllm.entrypoints.openai.models.serving import create_error_response as create_error_response
from vllm.exceptions import LoRAAdapterNotFoundError as LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel as LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights as LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager as LoRAModelManager
from vllm.lora.ops.torch_ops import lora_ops as lora_ops
from vllm.lora.peft_helper import PEFTHelper as PEFTHelper
from vllm.lora.punica_wrapper import punica_cpu as punica_cpu
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase as PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as PunicaWrapperCPU
from vllm.lora.request import LoRARequest as LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.utils import parse_fine_tuned_lora_name as parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as LRUCacheWorkerLoRAManager
from vllm.lora.worker_manager import WorkerLoRAManager as WorkerLoRAManager
from vllm.model_executor.models.utils import WeightsMapper as WeightsMapper
from vllm.model_executor.utils import get_moe_expert_mapping as get_moe_expert_mapping
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver as FilesystemResolver
from vllm.plugins.lora_resolvers.hf_hub_resolver import HfHubResolver as HfHubResolver
from vllm.v1.core import kv_cache_utils as kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM as AsyncLLM
from vllm.v1.engine.core import EngineCore as EngineCore
from vllm.v1.engine.core_client import AsyncMPClient as AsyncMPClient
from vllm.v1.engine.llm_engine import LLMEngine as LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor as OutputProcessor
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin as LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerBase as WorkerBase

from s3lora_serve.vllm_plugin.vllm_version import installed_vllm

logger = logging.getLogger("vllm.s3lora")  # vLLM's handlers print what is below "vllm"


def installed_version() -> str:
    """Version of the installed vLLM, from whichever distribution."""
    found = installed_vllm()
    return found[1] if found else "unknown"


def skipping_classes() -> tuple[tuple[Any, ...], Any, Any]:
    """Classes that skipping relies on: LoRA layers, the token mapping, the GPU operations.

    The layers are linear layers, embeddings and logits.

    Raises:
        ImportError: this vLLM does not have one of them.
    """
    from vllm.lora.layers import LogitsProcessorWithLoRA, LoRAMapping
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA as EmbeddingWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    layers = BaseLinearLayerWithLoRA, EmbeddingWithLoRA, LogitsProcessorWithLoRA
    return layers, LoRAMapping, PunicaWrapperGPU


def known_layers(manager: Any) -> list[Any]:
    """The LoRA layers of a worker whose operations (`add_lora_linear` and others) are known."""
    classes, *_ = skipping_classes()
    found = lora_manager(manager).modules.values()
    return [layer for layer in found if isinstance(layer, classes)]


def lora_manager(manager: Any) -> Any:
    """vLLM's LoRAModelManager of a worker: its model, LoRA layers and loaded adapters.

    NB: coupled to WorkerLoRAManager._adapter_manager.
    """
    return manager._adapter_manager


def adds_slice_by_slice(punica_wrapper: Any) -> bool:
    """Whether vLLM computes the slices of a packed layer one after the other."""
    return isinstance(punica_wrapper, PunicaWrapperCPU)


def takes_stacked_experts(manager: Any, layer: Any) -> bool:
    """Whether vLLM places adapters with experts in one tensor into an experts' LoRA layer.

    NB: coupled to LoRAModelManager._enable_mixed_moe_lora_format.
    """
    from vllm.lora.layers import FusedMoE3DWithLoRA

    mixed = getattr(lora_manager(manager), "_enable_mixed_moe_lora_format", False)
    return bool(mixed) or isinstance(layer, FusedMoE3DWithLoRA)


def is_classification_head(layer: Any) -> bool:
    """Whether a LoRA layer is a classifier's head."""
    try:
        from vllm.lora.layers import ClassificationHeadWithLoRA
    except ImportError:  # vLLM before it had them
        return False
    return isinstance(layer, ClassificationHeadWithLoRA)


MAPPING_METADATA = ("token_mapping_meta", "prompt_mapping_meta")
"""PunicaWrapperGPU's metadata of a batch: for all layers, and for the logits."""


def model_runners() -> list[type]:
    """The classes of model runners, V1's and V2's, that this process has imported.

    Importing V2's takes Triton and a second; a worker imports the one that it runs.
    """
    modules = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
    found = (getattr(sys.modules.get(name), "GPUModelRunner", None) for name in modules)
    return [each for each in found if each is not None]


def slot_count(manager: Any) -> int:
    """How many adapters a worker's batch may use.

    NB: coupled to LoRAModelManager.lora_index_to_id.
    """
    return len(lora_manager(manager).lora_index_to_id)


def slots_in_use(manager: Any) -> list[int]:
    """The slots of a worker that hold an adapter."""
    ids = lora_manager(manager).lora_index_to_id
    return [slot for slot, lora_id in enumerate(ids) if lora_id is not None]


def uses_gpu_operations(manager: Any) -> bool:
    """Whether all known LoRA layers of a worker use vLLM's operations for GPUs."""
    *_, on_gpu = skipping_classes()
    return all(isinstance(each.punica_wrapper, on_gpu) for each in known_layers(manager))


def is_warming_up(manager: Any) -> bool:
    """Whether a worker runs vLLM's dummy adapters, to measure memory and warm up."""
    return manager._cached_dummy_lora is not False


def runs_eagerly(vllm_config: Any) -> bool:
    """Whether the layers' Python code runs in every step."""
    from vllm.config import CompilationMode, CUDAGraphMode

    config = vllm_config.compilation_config
    modes = config.mode, config.cudagraph_mode
    return modes == (CompilationMode.NONE, CUDAGraphMode.NONE)


def calls_to_all_engines(engine: Any, method: str, args: tuple[Any, ...]) -> list[Any]:
    """Awaitable answers to a call of a worker method: one list of the workers' for each engine.

    AsyncLLM.collective_rpc calls all engines too, and returns the answers of the first one only.

    NB: coupled to AsyncMPClient.core_engines and _call_utility_async.
    """
    client = engine.engine_core
    call = method, None, args, None  # as AsyncMPClient.collective_rpc_async: no time limit
    return [
        client._call_utility_async("collective_rpc", *call, engine=one)
        for one in client.core_engines
    ]


def client_index(engine: Any) -> int:
    """The number of this API server among those that share the engines.

    NB: coupled to AsyncMPClient.client_index.
    """
    return int(engine.engine_core.client_index)


def packed_modules(adapter_manager: Any) -> dict[str, list[str]]:
    """The parts of each packed layer (qkv_proj: q_proj, k_proj, v_proj), by its name.

    NB: coupled to LoRAModelManager.packed_modules.
    """
    found: dict[str, list[str]] = adapter_manager.packed_modules
    return found


def has_requests(engine: Any) -> bool:
    """Whether the engine holds any request of this API server.

    NB: coupled to OutputProcessor.request_states.
    """
    return bool(engine.output_processor.request_states)


def has_requests_under_way(engine: Any, adapter_id: int) -> bool:
    """Whether the engine holds a request for the adapter of this id.

    NB: coupled to OutputProcessor.request_states.
    """
    states = engine.output_processor.request_states.values()
    return any(
        state.lora_request is not None and state.lora_request.lora_int_id == adapter_id
        for state in states
    )


def rename_mapper(model: Any) -> Any:
    """The mapper from names in adapters to the model's names; None if the model has none."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    if hasattr(mapper, "get_rename_mapper"):  # vLLM >= 0.29
        return mapper.get_rename_mapper()
    return mapper.get_unstacked_mapper()  # vLLM 0.28


def skipped_prefixes(manager: Any) -> tuple[str, ...]:
    """Prefixes of names in adapters that vLLM reads past for this model."""
    return tuple(getattr(lora_manager(manager).model, "lora_skip_prefixes", None) or ())


def is_pooling_model(manager: Any) -> bool:
    """Whether the served model embeds or classifies, so that vLLM finds names without `model.`."""
    return bool(lora_manager(manager).is_pooling_model)


_PLAIN_RULES = (
    "orig_to_new_regex",
    "orig_to_new_substr",
    "orig_to_new_prefix",
    "orig_to_new_suffix",
)


def plain_mapper(mapper: Any) -> dict[str, Any] | None:
    """A rename mapper as plain data, which any process can read; None if it cannot be said so."""
    rules = {name: vars(mapper).get(name) for name in _PLAIN_RULES} if mapper is not None else {}
    if mapper is not None and any(v for k, v in vars(mapper).items() if k not in rules):
        return None
    patterns = rules.pop("orig_to_new_regex", None) or {}
    plain: dict[str, Any] = {name: list(rule.items()) for name, rule in rules.items() if rule}
    if patterns:
        plain["orig_to_new_regex"] = [(p.pattern, p.flags, new) for p, new in patterns.items()]
    return plain


def mapper_of(plain: Mapping[str, Any]) -> Any:
    """The rename mapper that `plain_mapper` described; None for one that renames nothing."""
    rules: dict[str, Any] = {
        name: dict(rule) for name, rule in plain.items() if "regex" not in name
    }
    if patterns := plain.get("orig_to_new_regex"):
        rules["orig_to_new_regex"] = {re.compile(p, flags): new for p, flags, new in patterns}
    return WeightsMapper(**rules) if rules else None


def base_model(vllm_config: Any) -> str | None:
    """The served model as the operator named it."""
    return getattr(vllm_config.model_config, "model", None)


def is_first_rank() -> bool:
    """Whether this worker reports for all ranks, so that one admission counts once."""
    from vllm.distributed.parallel_state import get_world_group

    return bool(get_world_group().rank_in_group == 0)


def adapter_folder(request: LoRARequest, *, download: bool = True) -> Path | None:
    """The folder of the requested adapter; `download` allows hub ids. None if there is none."""
    if (local := local_folder(request)) is not None:
        return local
    return downloaded_folder(request) if download and is_hub_id(request) else None


def local_folder(request: LoRARequest) -> Path | None:
    """The folder of the requested adapter on this machine; None if there is none."""
    try:
        folder = Path(request.lora_path).expanduser()
        return folder.absolute() if folder.exists() else None
    except (OSError, RuntimeError, ValueError):  # no such user, too long, a null byte
        return None


def is_hub_id(request: LoRARequest) -> bool:
    """Whether vLLM would look for this path on the hub."""
    return not request.lora_path.startswith(("/", "~"))


def downloaded_folder(request: LoRARequest) -> Path | None:
    """The folder that vLLM downloads the adapter to; None if the download fails."""
    try:
        folder = Path(get_adapter_absolute_path(request.lora_path))
    except Exception as error:  # noqa: BLE001 - a download may fail with any error
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        asked = request.lora_name, request.lora_path
        logger.warning("s3lora: no adapter %r found at %r: %s", *asked, cause)
        return None
    return folder if folder.exists() else None


def not_found(request: LoRARequest) -> Exception:
    """The exception that vLLM turns into its own 404."""
    error: Exception = LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    return error


def request_for(name: str, path: str, number: int) -> LoRARequest:
    """A request for an adapter."""
    return LoRARequest(name, number, path)


def with_path(request: LoRARequest, folder: Path, number: int | None = None) -> LoRARequest:
    """The same request with another folder, to be read once."""
    return msgspec.structs.replace(
        request,
        lora_path=str(folder),
        lora_int_id=number or request.lora_int_id,
        load_inplace=False,
    )


def with_layout_of_experts(request: LoRARequest, *, stacked: bool) -> LoRARequest:
    """The same request with what its adapter's experts are: in one tensor, or one by one.

    vLLM leaves it to whoever registers an adapter to say so.
    """
    return msgspec.structs.replace(request, is_3d_lora_weight=stacked)


def for_base_model(request: Any) -> Any:
    """The same engine request without its adapter."""
    return msgspec.structs.replace(request, lora_request=None)


def has_resolvers(models: Any) -> bool:
    """Whether vLLM's registry of served models asks resolvers for names that it lacks."""
    return bool(models.lora_resolvers)


def resolver_folder(resolver: Any) -> Path | None:
    """The folder below which a resolver finds adapters; None if it has none (the hub's cache)."""
    folder = getattr(resolver, "lora_cache_dir", None)
    return Path(folder) if folder else None


def api_keys(args: Any) -> list[str]:
    """The API keys of vLLM's server: from the command line, else from the environment."""
    import vllm.envs as envs

    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def runtime_loading_open() -> bool:
    """Whether the operator has enabled vLLM's routes that load adapters at run time."""
    import vllm.envs as envs

    return bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING)


def load_request_model() -> Any:
    """Body of POST /v1/load_lora_adapter."""
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    return LoadLoRAAdapterRequest


def unload_request_model() -> Any:
    """Body of POST /v1/unload_lora_adapter."""
    from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

    return UnloadLoRAAdapterRequest


def drop_route(app: Any, path: str, method: str) -> None:
    """Remove vLLM's own route, which one of the gate's replaces.

    vLLM < 0.32 would keep both, and the first would answer.
    """
    routes = app.router.routes
    routes[:] = [
        route
        for route in routes
        if getattr(route, "path", None) != path or method not in (route.methods or ())
    ]


def json_only() -> list[Any]:
    """vLLM's check that a request is JSON, as FastAPI dependencies."""
    from fastapi import Depends
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    return [Depends(validate_json_request)]


def served_models(raw_request: Any) -> Any:
    """vLLM's registry of served models and adapters, in the API server."""
    from vllm.entrypoints.openai.models.api_router import models

    return models(raw_request)
