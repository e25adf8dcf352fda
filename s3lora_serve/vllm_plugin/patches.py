"""Replacements of vLLM's methods; contract.py has checked that the methods exist."""

import functools
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any

from s3lora_serve.errors import AdapterRejected, Reason, TooLong
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.compat import (
    AsyncLLM,
    EngineCore,
    LLMEngine,
    LoRAModelRunnerMixin,
    LoRARequest,
    LRUCacheWorkerLoRAManager,
    OpenAIServingModels,
    PEFTHelper,
    WorkerBase,
    WorkerLoRAManager,
    create_error_response,
    kv_cache_utils,
)
from s3lora_serve.vllm_plugin.contract import broken


def wrap_load_adapter(wrapper: Callable[[Any, LoRARequest, Callable[..., Any]], Any]) -> None:
    """Replace `_load_adapter`, the choke point, by `wrapper(manager, request, original)`.

    NB: coupled to WorkerLoRAManager._load_adapter, in which every door ends.
    """
    original = WorkerLoRAManager._load_adapter

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        return wrapper(self, lora_request, original)

    WorkerLoRAManager._load_adapter = _load_adapter


def load_adapter(manager: Any, request: LoRARequest) -> Any:
    """vLLM's own `_load_adapter`: the adapter in host memory, not yet in a slot."""
    return WorkerLoRAManager._load_adapter.__wrapped__(manager, request)


def wrap_add_adapter(wrapper: Callable[[Any, LoRARequest, Callable[..., bool]], bool]) -> None:
    """Replace each `add_adapter` by `wrapper(manager, request, original)`."""
    for owner in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        owner.add_adapter = _wrapped_add(owner.add_adapter, wrapper)


def _wrapped_add(original: Callable[..., bool], wrapper: Callable[..., bool]) -> Any:
    # Callers and subclasses name the parameter differently; both pass it by position.
    def add_adapter(self: Any, lora_request: LoRARequest) -> bool:
        return wrapper(self, lora_request, original)

    return add_adapter


def after_remove_lora(listener: Callable[[int], None]) -> None:
    """Call `listener(id)` in a worker after the engine has removed an adapter."""
    original = LoRAModelRunnerMixin.remove_lora

    def remove_lora(self: Any, lora_id: int) -> bool:
        removed: bool = original(self, lora_id)
        listener(lora_id)
        return removed

    LoRAModelRunnerMixin.remove_lora = remove_lora


def wrap_add_lora(wrapper: Callable[..., Awaitable[bool]]) -> None:
    """Replace the API server's `add_lora` by `wrapper(engine, request, original)`."""
    original = AsyncLLM.add_lora

    async def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        return await wrapper(self, lora_request, original)

    AsyncLLM.add_lora = add_lora


def wrap_add_request(admitted: Callable[[Any, LoRARequest], LoRARequest]) -> None:
    """Have `LLMEngine` (`LLM.generate`) use the request that `admitted` returns."""
    original = LLMEngine.add_request

    def add_request(
        self: Any,
        request_id: Any,
        prompt: Any,
        params: Any,
        arrival_time: Any = None,
        lora_request: LoRARequest | None = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        if lora_request is not None and self.vllm_config.lora_config is not None:
            lora_request = admitted(self, lora_request)
        return original(self, request_id, prompt, params, arrival_time, lora_request, *rest, **more)

    LLMEngine.add_request = add_request


def compare_requests_by_name_and_id() -> None:
    """Compare LoRA requests by name and id.

    vLLM compares them by name alone. If one batch holds two adapters of one name (replaced or
    loaded again while a request ran), one of them is not activated, and the engine stops.
    """

    def same(self: LoRARequest, other: object) -> bool:
        if not isinstance(other, LoRARequest):
            return False
        ours, theirs = (self.lora_name, self.lora_int_id), (other.lora_name, other.lora_int_id)
        return ours == theirs

    LoRARequest.__eq__ = same
    LoRARequest.__hash__ = lambda self: hash((self.lora_name, self.lora_int_id))


def separate_quarantined_blocks(is_quarantined: Callable[[str], bool]) -> None:
    """Hash prefix-cache blocks of a quarantined adapter differently than before its quarantine."""
    original = kv_cache_utils._gen_lora_extra_hash_keys

    def _gen_lora_extra_hash_keys(request: Any) -> Any:
        keys = original(request)
        if keys and is_quarantined(request.lora_request.lora_path):
            return [*keys, *keys]  # another hash, whatever the type of a key in this version
        return keys

    kv_cache_utils._gen_lora_extra_hash_keys = _gen_lora_extra_hash_keys


def without_adapter_if(has_none: Callable[[LoRARequest], bool]) -> None:
    """Have the engine take a request as the base model's if `has_none(its lora_request)`.

    NB: coupled to EngineCore.preprocess_add_request, which runs beside the engine's steps. The API
    server's own record of the request keeps the adapter, for vLLM's metrics.
    """
    original = EngineCore.preprocess_add_request

    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if request.lora_request is not None and has_none(request.lora_request):
            request = compat.for_base_model(request)
        return original(self, request)

    EngineCore.preprocess_add_request = preprocess_add_request


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace one object's method by `wrapper(original, …)`."""
    setattr(owner, name, functools.partial(wrapper, getattr(owner, name)))


def wrap_unload(check: Callable[[str], None], removed: Callable[[Any, str], None]) -> None:
    """Call `check(name)`, which may refuse, before vLLM unloads an adapter, `removed` after it."""
    original = OpenAIServingModels.unload_lora_adapter

    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        try:
            check(request.lora_name)
        except AdapterRejected as refusal:
            return rejected(Reason.of(refusal))
        result = await original(self, request)
        if isinstance(result, str):
            removed(self.engine_client, request.lora_name)
        return result

    OpenAIServingModels.unload_lora_adapter = unload_lora_adapter


def wrap_model_list(origin: Callable[[str], str | None]) -> None:
    """Show each adapter in /v1/models with its tenant's path, `origin(name)`, not the store's."""
    original = OpenAIServingModels.show_available_models

    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        for card in models.data:
            card.root = origin(card.id) or card.root
        return models

    OpenAIServingModels.show_available_models = show_available_models


def wrap_doors(registering: Callable[[str], AbstractContextManager[Any]]) -> None:
    """Have adapters arrive within `registering(door)`; answer refusals with 400 or 429.

    The context gives the registration, whose `refusal` says what became of it: vLLM's answer has
    only the text of an error.
    """
    owner = OpenAIServingModels
    load, static, resolve = owner.load_lora_adapter, owner.init_static_loras, owner.resolve_lora

    async def load_lora_adapter(self: Any, request: Any, base_model_name: Any = None) -> Any:
        with registering("http") as registration:
            registration.refusal = too_long(request.lora_name, request.lora_path)
            if registration.refusal is not None:
                return rejected(registration.refusal)
            result = await load(self, request, base_model_name)
            if registration.refusal is None or isinstance(result, str):
                return result
            return rejected(registration.refusal)

    async def init_static_loras(self: Any) -> None:
        with registering("static"):
            await static(self)

    async def resolve_lora(self: Any, lora_name: str) -> Any:
        if (refusal := too_long(lora_name)) is not None:
            return rejected(refusal)
        with registering("resolver"):
            return await resolve(self, lora_name)

    owner.load_lora_adapter = load_lora_adapter
    owner.init_static_loras = init_static_loras
    owner.resolve_lora = resolve_lora


def too_long(name: str, path: str = "") -> Reason | None:
    """Why vLLM must not keep or log a name or path; None if it may."""
    try:
        check_lengths(name, path)
    except TooLong as refusal:
        return Reason.of(refusal)
    return None


def rejected(refusal: Reason) -> Any:
    """vLLM's answer with a refusal: 400, or 429 if the load may be tried again later."""
    status, kind = HTTPStatus.BAD_REQUEST, "AdapterRejected"
    if refusal.is_postponed:
        status, kind = HTTPStatus.TOO_MANY_REQUESTS, "LoadPostponed"
    return create_error_response(message=str(refusal), err_type=kind, status_code=status)


def replace_match_pattern(first_value: Callable[[dict[str, Any], str], Any]) -> None:
    """Replace `PEFTHelper._match_pattern` by `first_value(pattern, module)`."""
    PEFTHelper._match_pattern = staticmethod(first_value)


def after_create_lora_manager(listener: Callable[[Any, Any], None]) -> None:
    """Call `listener(worker_lora_manager, vllm_config)` once a worker's LoRA modules exist."""
    for owner in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        _wrap_create(owner, listener)


def _wrap_create(owner: Any, listener: Callable[[Any, Any], None]) -> None:
    original = owner.create_lora_manager

    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        created = original(self, model, vllm_config)
        listener(self, vllm_config)
        return created

    owner.create_lora_manager = create_lora_manager


def add_worker_method(name: str, method: Callable[..., Any]) -> None:
    """Have `collective_rpc(name)` call `method` in every worker.

    Raises:
        ContractBroken: the name is taken.
    """
    if hasattr(WorkerBase, name):
        broken(f"WorkerBase has a {name} already")
    setattr(WorkerBase, name, method)
