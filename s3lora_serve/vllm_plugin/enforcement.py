"""What a worker makes of an admitted copy: vLLM loads it, and what is stripped is taken out."""

from collections.abc import Callable
from typing import Any

from s3lora_serve.adapter import read_adapter
from s3lora_serve.policy import Limits
from s3lora_serve.store import Kept
from s3lora_serve.vllm_plugin import compat, served_model
from s3lora_serve.vllm_plugin.desk import Refused
from s3lora_serve.vllm_plugin.fit import check_loaded, fitted_names, load_copy, remove_unscorable
from s3lora_serve.vllm_plugin.pattern_matching import check_patterns

CHECKED = Limits(max_scaling=None, max_rank=2**31, max_bytes=2**62)
"""For content that its digest shows to be what was admitted, under the limits of that day."""


def enforced(manager: Any, request: Any, original: Callable[..., Any], kept: Kept) -> Any:
    """The LoRAModel that vLLM may take."""
    verdict = kept.verdict
    if kept.copy is None:
        raise Refused(str(verdict.reason))
    passed = "strip" if verdict.removed else "admit" if verdict.unscored else "reject"
    adapter = read_adapter(kept.copy, CHECKED, passed)
    check_patterns(adapter)
    served = fitted_names(manager, adapter)
    lora = load_copy(manager, compat.with_path(request, kept.path), original)
    check_loaded(lora, served, adapter)
    if verdict.mode == "enforce":
        for name in verdict.stripped:
            served_model.strip_module(lora, served[name])
        remove_unscorable(lora, served, verdict.removed)
    if not lora.loras:
        served_model.make_inert(lora)
    return lora
