"""Checks that vLLM loaded what was scored."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.errors import DoesNotFitModel, NotFinite, RefusedByVLLM
from s3lora_serve.vllm_plugin.engine import lora_modules
from s3lora_serve.vllm_plugin.engine.loaded_adapter import remove_full_modules
from s3lora_serve.vllm_plugin.model_modules import ModelModules


def load_copy(manager: Any, request: Any, original: Callable[..., Any]) -> Any:
    """The LoRAModel that vLLM loads from the stored copy.

    Raises:
        RefusedByVLLM: vLLM does not load it.
    """
    try:
        return original(manager, request)
    except Exception as error:
        text = str(error).replace(request.lora_path, "the adapter")
        raise RefusedByVLLM(f"vLLM says: {text}") from error


def check_loaded(
    lora: Any, vllm_names: dict[str, str], adapter: Adapter, give_way: Callable[[], None]
) -> None:
    """Check that vLLM loaded what was scored: the same modules, factors and scaling, and finite.

    vLLM casts factors to the engine's dtype and later multiplies B by the scaling. Either can take
    a finite number out of the dtype's range.

    Raises:
        DoesNotFitModel: other modules, factors or scaling than were scored.
        NotFinite: a value leaves the range of the engine's dtype.
    """
    scored = set(vllm_names.values())
    unscorable = {lora_modules.module_of(key) for key in adapter.unscorable}
    for name in lora.loras:
        if name not in scored and not any(name.endswith(other) for other in unscorable):
            raise DoesNotFitModel(f"vLLM loaded {name}, which was not scored")
    for module in adapter.modules:
        give_way()
        loaded = lora.loras.get(vllm_names[module.name])
        if loaded is None:
            continue
        if not math.isclose(loaded.scaling, module.scaling, rel_tol=1e-6):
            raise DoesNotFitModel(
                f"vLLM would scale {module.name} by {loaded.scaling:g}, it was scored with"
                f" {module.scaling:g} (this version may not know rank_pattern and alpha_pattern)"
            )
        A, B = module.part("A", loaded.lora_a), module.part("B", loaded.lora_b)
        if not (_same(A, module.A) and _same(B, module.B)):
            raise DoesNotFitModel(f"vLLM loaded other factors for {module.name} than were scored")
        if not (_within(A, 1.0) and _within(B, module.scaling)):
            raise NotFinite(
                f"module {module.name} leaves the range of {B.dtype}, in which this"
                " server holds adapters"
            )


def remove_left_out(
    lora: Any, modules: ModelModules, adapter: Adapter, left_out: Collection[str]
) -> None:
    """Remove what vLLM has read of modules that the model does not take: nothing uses it."""
    if not left_out:
        return
    names = frozenset(left_out)
    keys = [key for m in adapter.modules if m.name in names for key in m.keys]
    for name in set(modules.mapped(keys).values()):
        lora.loras.pop(name, None)


def remove_unscorable(lora: Any, vllm_names: dict[str, str], removed: Collection[str]) -> None:
    """Remove tensors that the policy does not admit unscored."""
    if not removed:
        return
    scored = set(vllm_names.values())
    for name in [name for name in lora.loras if name not in scored]:
        del lora.loras[name]
    remove_full_modules(lora)


def _same(loaded: Tensor, scored: Tensor) -> bool:
    return torch.equal(loaded.cpu(), scored.to(loaded.dtype))


def _within(tensor: Tensor, factor: float) -> bool:
    """Whether the largest entry, times a factor, is a finite number of the tensor's dtype."""
    least, most = map(float, torch.aminmax(tensor))  # several times faster than a norm
    largest = max(abs(least), abs(most)) * abs(factor)
    return largest <= torch.finfo(tensor.dtype).max
