"""Requests of adapters without effect are batched as the base model's.

An adapter that is stripped or quarantined whole has no weights in any layer. vLLM would take the
captured graph that has LoRA operations for it; with its requests counted as the base model's, it
takes the one without.
"""

from typing import Any

from s3lora_serve.vllm_plugin import compat, patches


def batch_as_base(manager: Any) -> None:
    """Have both model runners do so in this worker."""

    def without_effect(request: Any) -> bool:
        return request is not None and is_idle(manager, request.lora_int_id)

    patches.wrap_batched_requests(without_effect)


def is_idle(manager: Any, adapter_id: int) -> bool:
    """Whether a worker has loaded an adapter, and it holds no module. False: not loaded yet."""
    loaded = compat.lora_manager(manager).get_adapter(adapter_id)
    return loaded is not None and not loaded.loras
