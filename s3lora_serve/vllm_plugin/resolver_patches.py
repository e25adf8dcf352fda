"""Replacements of methods with which vLLM looks adapters up; contract.py has checked them."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from s3lora_serve.errors import AdapterRejected, Reason
from s3lora_serve.vllm_plugin.compat import (
    FilesystemResolver,
    HfHubResolver,
    OpenAIServingModels,
)
from s3lora_serve.vllm_plugin.patches import rejected


def wrap_resolvers(
    check: Callable[[Any, str], None],
    find: Callable[[Any, str, str, str], Awaitable[Any]],
    ask_hub: Callable[[Any, str, str, Callable[..., Awaitable[Any]]], Awaitable[Any]],
) -> None:
    """Have resolvers look up what `check(models, name)` lets pass, and refusals answered with 400.

    `find(resolver, name, path, base_model)` replaces how they read what lies at a path.
    `ask_hub(resolver, base_model, name, original)` replaces the hub resolver's lookup.
    """
    owner = OpenAIServingModels
    resolve, hub = owner.resolve_lora, HfHubResolver.resolve_lora

    async def resolve_lora(self: Any, lora_name: str) -> Any:
        try:
            check(self, lora_name)
            return await resolve(self, lora_name)
        except AdapterRejected as refusal:
            return rejected(Reason.of(refusal))

    async def found(self: Any, lora_name: str, lora_path: str, base_model_name: str) -> Any:
        return await find(self, lora_name, lora_path, base_model_name)

    async def from_hub(self: Any, base_model_name: str, lora_name: str) -> Any:
        return await ask_hub(self, base_model_name, lora_name, hub)

    owner.resolve_lora = resolve_lora
    FilesystemResolver._get_lora_req_from_path = found
    HfHubResolver.resolve_lora = from_hub


def replace_name_locks(locks: Callable[[], Any]) -> None:
    """Have vLLM's registry of served models take its locks from `locks()`, by adapter name.

    NB: coupled to its attribute `lora_resolver_lock`. Without it vLLM's own stay.
    """
    original = OpenAIServingModels.__init__

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        self.lora_resolver_lock = locks()

    OpenAIServingModels.__init__ = initialize
