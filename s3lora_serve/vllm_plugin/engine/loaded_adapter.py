"""Changes to a loaded adapter (vLLM's LoRAModel), and adapters without effect."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from s3lora_serve.adapter.reader import Module
from s3lora_serve.vllm_plugin import compat

INERT = "s3lora.inert"
"""Name of the only entry of an adapter without effect. No module has it, so every LoRA slot of the
adapter is reset. Without any entry vLLM's packing step stops the engine."""


def strip_modules(lora: Any, vllm_names: Mapping[str, str], modules: Iterable[Module]) -> None:
    """Remove the updates of some modules; `vllm_names` has theirs.

    Experts are packed together and none may be missing, so an expert gets B = 0 instead.
    """
    own: set[str] = set()  # whose B is a copy already: vLLM's may be the file's own memory
    for module in modules:
        name = vllm_names[module.name]
        if not module.is_expert:
            lora.loras.pop(name, None)
        elif (weights := lora.loras.get(name)) is not None:
            if name not in own:
                weights.lora_b = weights.lora_b.clone()
                own.add(name)
            module.part("B", weights.lora_b).zero_()


def remove_full_modules(lora: Any) -> None:
    """Remove the whole layers that an adapter brings (modules_to_save)."""
    if getattr(lora, "modules_to_save", None):
        lora.modules_to_save = {}


def remove_effect(lora: Any) -> None:
    """Leave one entry that no module uses: the adapter then serves exactly the base model."""
    zero = torch.zeros(1, 1)
    lora.loras[INERT] = compat.LoRALayerWeights(INERT, 1, 1, zero, zero.clone(), scaling=1.0)


def adapter_without_effect(request: Any) -> Any:
    """A new LoRAModel without effect, under the id of the request."""
    lora = compat.LoRAModel(request.lora_int_id, 1, {})
    remove_effect(lora)
    return lora


def add_to_slot(manager: Any, lora: Any) -> bool:
    """Add and activate a loaded adapter, as vLLM's own `add_adapter` does."""
    adapters = compat.lora_manager(manager)
    if len(adapters) + 1 > adapters.capacity and hasattr(adapters, "remove_oldest_adapter"):
        adapters.remove_oldest_adapter()
    added: bool = adapters.add_adapter(lora)
    adapters.activate_adapter(lora.id)
    return added
