"""Everything this project knows of vLLM: imports, version branches, and the contract it relies on.

Read against vLLM 0.28 to 0.33. What is checked here is names and signatures; a version that keeps
them is guarded, one that does not never starts.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
from vllm.entrypoints.openai.models.serving import OpenAIServingModels, create_error_response
from vllm.lora.lora_model import LoRAModel as LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights as LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.utils import parse_fine_tuned_lora_name as parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import get_moe_expert_mapping as get_moe_expert_mapping
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerBase

from s3lora_serve.errors import ContractBroken, refusal_in
from s3lora_serve.guarding import installed_vllm

logger = logging.getLogger("vllm.s3lora")  # vLLM's handlers print what is below "vllm"

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
    if not {"get_rename_mapper", "get_unstacked_mapper"} & set(vars(WeightsMapper)):
        _broken("WeightsMapper has no get_rename_mapper")


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


def rename_mapper(model: Any) -> Any:
    """What maps the names in adapters to this model's, as vLLM loads them; None where none does."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    if hasattr(mapper, "get_rename_mapper"):  # vLLM >= 0.29
        return mapper.get_rename_mapper()
    return mapper.get_unstacked_mapper()  # vLLM 0.28


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
    try:
        local = Path(request.lora_path).expanduser()
        if not local.exists() and (local.is_absolute() or not download):
            return None
    except (OSError, RuntimeError, ValueError):  # no such user, too long, a null byte
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


def drop_route(app: Any, path: str, method: str) -> None:
    """Take vLLM's own route away, for one of the gate's to stand in its place.

    vLLM < 0.32 would keep both, and the earlier one would answer.
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
