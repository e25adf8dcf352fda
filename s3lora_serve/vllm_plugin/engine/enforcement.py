"""Enforcement of a verdict: vLLM loads the stored copy, and stripped modules are removed."""

from collections.abc import Callable
from typing import Any

from s3lora_serve.adapter.reader import read_adapter
from s3lora_serve.policy.limits import Limits
from s3lora_serve.store.stored_copy import StoredCopy
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.engine.loaded_adapter import remove_effect, strip_modules
from s3lora_serve.vllm_plugin.engine.loaded_checks import (
    check_loaded,
    load_copy,
    remove_left_out,
    remove_unscorable,
)
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel
from s3lora_serve.vllm_plugin.engine.rank_alpha_matching import check_patterns

ADMITTED_LIMITS = Limits(max_scaling=None, max_rank=2**31, max_bytes=2**62)
"""The digest shows that the copy was admitted, under the limits in force at that time."""


def enforce(
    model: WorkerModel,
    request: Any,
    original: Callable[..., Any],
    stored: StoredCopy,
    give_way: Callable[[], None],
) -> Any:
    """The LoRAModel that vLLM may serve for a stored copy; `give_way` is called between parts.

    Raises:
        AdapterRejected: the copy is refused, does not fit the model, or vLLM does not load it.
    """
    verdict = stored.verdict
    if stored.copy is None:
        raise verdict.refusal
    on_unscorable = "strip" if verdict.removed else "admit" if verdict.unscored else "reject"
    give_way()
    adapter = read_adapter(stored.copy, ADMITTED_LIMITS, on_unscorable, give_way)
    check_patterns(adapter)
    taken = adapter.without(verdict.left_out)
    vllm_names = model.modules.vllm_names(taken)
    give_way()
    stacked = any(module.expert is not None for module in taken.modules)
    request = compat.with_layout_of_experts(request, stacked=stacked)
    lora = load_copy(model.manager, compat.with_path(request, stored.path), original)
    remove_left_out(lora, model.modules, adapter, verdict.left_out)
    check_loaded(lora, vllm_names, taken, give_way)
    if verdict.mode == "enforce":
        stripped = frozenset(verdict.stripped)
        strip_modules(lora, vllm_names, [m for m in taken.modules if m.name in stripped])
        remove_unscorable(lora, vllm_names, verdict.removed)
    if not lora.loras:
        remove_effect(lora)
    return lora
