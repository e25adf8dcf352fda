"""Everything this project knows of vLLM: imports, version branches, and the contract it relies on.

Read against vLLM 0.28 to 0.33. What is checked here is names and signatures; a version that keeps
them is guarded, one that does not never starts.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.entrypoints.openai.models.serving import OpenAIServingModels, create_error_response
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.model_executor.utils import get_moe_expert_mapping
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerBase

from s3lora_serve.errors import ContractBroken, refusal_in
from s3lora_serve.guarding import installed_vllm

logger = logging.getLogger("vllm.s3lora")  # vLLM's handlers print what is below "vllm"

INERT = "s3lora.inert"
"""Name of the one entry of an adapter without effect. No module has it, so every LoRA slot of the
adapter is reset; without any entry vLLM's packing step stops the engine."""

_CONTRACT: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (WorkerLoRAManager, "_load_adapter", ("self", "lora_request")),
    (WorkerLoRAManager, "add_adapter", ("self", "adapter_request")),
    (LRUCacheWorkerLoRAManager, "add_adapter", ("self", "lora_request")),
    (WorkerLoRAManager, "create_lora_manager", ("self", "model", "vllm_config")),
    (LRUCacheWorkerLoRAManager, "create_lora_manager", ("self", "model", "vllm_config")),
    (LoRAModelManager, "activate_adapter", ("self", "lora_id")),
    (LoRAModelManager, "add_adapter", ("self", "adapter")),
    (LoRAModelRunnerMixin, "add_lora", ("self", "lora_request")),
    (AsyncLLM, "add_lora", ("self", "lora_request")),
    (AsyncLLM, "remove_lora", ("self", "lora_id")),
    (OpenAIServingModels, "load_lora_adapter", ("self", "request", "base_model_name")),
    (OpenAIServingModels, "init_static_loras", ("self",)),
    (OpenAIServingModels, "resolve_lora", ("self", "lora_name")),
)


def installed_version() -> str:
    """Version of the installed vLLM, whichever distribution it came as."""
    found = installed_vllm()
    return found[1] if found else "unknown"


def check_contract() -> None:
    """Check the names and signatures that the hook relies on.

    Raises:
        ContractBroken: this vLLM is not the one the hook was written for.
    """
    for owner, name, expected in _CONTRACT:
        found = (
            tuple(inspect.signature(getattr(owner, name)).parameters)
            if hasattr(owner, name)
            else None
        )
        if found != expected:
            _broken(f"{owner.__name__}.{name} takes {found}, expected {expected}")
    if "_load_adapter" in vars(LRUCacheWorkerLoRAManager):
        _broken("LRUCacheWorkerLoRAManager has a _load_adapter of its own")
    for name in ("lora_a", "lora_b", "scaling"):
        if name not in inspect.signature(LoRALayerWeights.__init__).parameters:
            _broken(f"LoRALayerWeights takes no {name}")
    if "loras" not in inspect.signature(LoRAModel.__init__).parameters:
        _broken("LoRAModel takes no loras")
    if not {"lora_name", "lora_path", "lora_int_id"} <= set(LoRARequest.__struct_fields__):
        _broken(f"LoRARequest has the fields {LoRARequest.__struct_fields__}")


def _broken(problem: str) -> None:
    raise ContractBroken(f"vLLM {installed_version()}: {problem}")


def wrap_load_adapter(wrapper: Callable[[Any, LoRARequest, Callable[..., Any]], Any]) -> None:
    """Put `wrapper(manager, request, original)` in the place of `_load_adapter`: the choke point.

    NB: coupled to WorkerLoRAManager._load_adapter, which every door ends in.
    """
    original = WorkerLoRAManager._load_adapter

    def _load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        return wrapper(self, lora_request, original)

    WorkerLoRAManager._load_adapter = _load_adapter


def wrap_add_adapter(wrapper: Callable[[Any, LoRARequest, Callable[..., bool]], bool]) -> None:
    """Put `wrapper(manager, request, original)` in the place of each `add_adapter`."""
    for owner in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        owner.add_adapter = _wrapped_add(owner.add_adapter, wrapper)


def _wrapped_add(original: Callable[..., bool], wrapper: Callable[..., bool]) -> Any:
    # Callers and subclasses name the parameter differently; both pass it by position.
    def add_adapter(self: Any, lora_request: LoRARequest) -> bool:
        return wrapper(self, lora_request, original)

    return add_adapter


def around_registration(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter `context()` while a worker serves a registration call, not the engine's loop."""
    original = LoRAModelRunnerMixin.add_lora

    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        with context():
            added: bool = original(self, lora_request)
            return added

    LoRAModelRunnerMixin.add_lora = add_lora


def wrap_add_lora(wrapper: Callable[..., Awaitable[bool]]) -> None:
    """Put `wrapper(engine, request, original)` in the place of the API server's `add_lora`."""
    original = AsyncLLM.add_lora

    async def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        return await wrapper(self, lora_request, original)

    AsyncLLM.add_lora = add_lora


def wrap_doors(door: ContextVar[str]) -> None:
    """Let `door` say by which way an adapter comes, and give HTTP clients refusals as 400."""
    owner = OpenAIServingModels
    load, static, resolve = owner.load_lora_adapter, owner.init_static_loras, owner.resolve_lora

    async def load_lora_adapter(self: Any, request: Any, base_model_name: Any = None) -> Any:
        with _through(door, "static" if door.get() == "static" else "http"):
            result = await load(self, request, base_model_name)
        refusal = None if isinstance(result, str) else refusal_in(result.error.message)
        if refusal is None:
            return result
        return create_error_response(
            message=refusal, err_type="AdapterRejected", status_code=HTTPStatus.BAD_REQUEST
        )

    async def init_static_loras(self: Any) -> None:
        with _through(door, "static"):
            await static(self)

    async def resolve_lora(self: Any, lora_name: str) -> Any:
        with _through(door, "resolver"):
            return await resolve(self, lora_name)

    owner.load_lora_adapter = load_lora_adapter
    owner.init_static_loras = init_static_loras
    owner.resolve_lora = resolve_lora


@contextmanager
def _through(door: ContextVar[str], name: str) -> Iterator[None]:
    token = door.set(name)
    try:
        yield
    finally:
        door.reset(token)


def after_create_lora_manager(listener: Callable[[Any, Any], None]) -> None:
    """Call `listener(worker_lora_manager, vllm_config)` once a worker has its LoRA modules."""
    for owner in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        _wrap_create(owner, listener)


def _wrap_create(owner: Any, listener: Callable[[Any, Any], None]) -> None:
    original = owner.create_lora_manager

    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        created = original(self, model, vllm_config)
        self._s3lora_vllm_config = vllm_config
        listener(self, vllm_config)
        return created

    owner.create_lora_manager = create_lora_manager


def base_model(vllm_config: Any) -> str | None:
    """The served model as the operator named it."""
    return getattr(vllm_config.model_config, "model", None)


def add_worker_method(name: str, method: Callable[..., Any]) -> None:
    """Let `collective_rpc(name)` call `method(worker, …)` on every worker.

    Raises:
        ContractBroken: the name is taken.
    """
    if hasattr(WorkerBase, name):
        _broken(f"WorkerBase has a {name} already")
    setattr(WorkerBase, name, method)


def is_first_rank() -> bool:
    """Whether this worker speaks for all ranks, so that one admission counts once."""
    from vllm.distributed.parallel_state import get_world_group

    return bool(get_world_group().rank_in_group == 0)


def adapter_folder(request: LoRARequest, *, download: bool = True) -> Path | None:
    """Where the requested adapter lies; None if nowhere.

    vLLM takes what is no local path for a hub id, and downloads it: not where `download` is false.
    """
    local = Path(request.lora_path).expanduser()
    if not local.exists() and (local.is_absolute() or not download):
        return None
    try:
        folder = Path(get_adapter_absolute_path(request.lora_path))
    except Exception:  # whatever a download ended in, there is no adapter
        logger.exception("s3lora: adapter %r at %r", request.lora_name, request.lora_path)
        return None
    return folder if folder.exists() else None


def not_found(request: LoRARequest) -> Exception:
    """The exception that vLLM turns into its own 404."""
    from vllm.exceptions import LoRAAdapterNotFoundError

    error: Exception = LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    return error


def with_path(request: LoRARequest, folder: Path) -> LoRARequest:
    """The same request for the files in another folder."""
    return msgspec.structs.replace(request, lora_path=str(folder))


def served_names(manager: Any, keys: Iterable[str]) -> dict[str, str]:
    """vLLM's module name for each tensor name of an adapter (models may rename modules).

    Raises:
        ValueError: vLLM cannot map a name.
    """
    mapper = getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None)
    if mapper is not None and hasattr(mapper, "get_rename_mapper"):
        mapper = mapper.get_rename_mapper()
    return {key: parse_fine_tuned_lora_name(key, mapper)[0] for key in keys}


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
    mapping = get_moe_expert_mapping(model)
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


def strip_module(lora: LoRAModel, name: str) -> None:
    """Take away one module's update.

    Experts are packed together and none may be missing, so one alone is left with B = 0.
    """
    if ".experts." not in name:
        lora.loras.pop(name, None)
    elif name in lora.loras:
        lora.loras[name].lora_b = torch.zeros_like(lora.loras[name].lora_b)


def drop_full_modules(lora: LoRAModel) -> None:
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


def make_inert(lora: LoRAModel) -> None:
    """Leave one entry that no module uses: the adapter then serves exactly the base model."""
    nothing = torch.zeros(1, 1)
    lora.loras[INERT] = LoRALayerWeights(INERT, 1, 1, nothing, nothing.clone(), scaling=1.0)


def inert_adapter(request: LoRARequest) -> LoRAModel:
    """An adapter without effect, under the id that was asked for."""
    lora = LoRAModel(request.lora_int_id, 1, {})
    make_inert(lora)
    return lora


def add_loaded(manager: Any, lora: LoRAModel) -> bool:
    """Add and activate an adapter that is loaded, as vLLM's own `add_adapter` does."""
    adapters = manager._adapter_manager
    if len(adapters) + 1 > adapters.capacity and hasattr(adapters, "remove_oldest_adapter"):
        adapters.remove_oldest_adapter()
    added: bool = adapters.add_adapter(lora)
    adapters.activate_adapter(lora.id)
    return added


def api_keys(args: Any) -> list[str]:
    """The keys that vLLM's server asks for: the command line's, else the environment's."""
    import vllm.envs as envs

    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def runtime_loading_open() -> bool:
    """Whether the operator opened vLLM's routes that load adapters at run time."""
    import vllm.envs as envs

    return bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING)


def load_request_model() -> Any:
    """Body of POST /v1/load_lora_adapter."""
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

    return LoadLoRAAdapterRequest


def json_only() -> list[Any]:
    """vLLM's check that a request is JSON, as FastAPI dependencies."""
    from fastapi import Depends
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    return [Depends(validate_json_request)]


def served_models(raw_request: Any) -> Any:
    """vLLM's registry of served models and adapters, in the API server."""
    from vllm.entrypoints.openai.models.api_router import models

    return models(raw_request)
