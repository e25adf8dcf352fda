"""What a worker's LoRA slot holds: the only input of the LoRA kernels."""

from collections.abc import Iterator
from typing import Any

import torch


def slot_buffers(adapter_manager: Any, slot: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a slot that are not zero, by layer, side and slice; they are vLLM's own."""
    for name, layer in adapter_manager.modules.items():
        for side, stacked in vars(layer).items():
            # Of experts, `lora_a_stacked` is a list of views of the others.
            if side.endswith("_stacked") and isinstance(stacked, tuple):
                for part, buffers in enumerate(stacked):
                    if buffers[slot].any():
                        yield f"{name} {side} {part}", buffers[slot]
