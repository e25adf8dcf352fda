"""Base-model requests in one batch with adapters, on the CPU: no adapter acts on their tokens."""

import functools
from typing import Any

from s3lora_serve.vllm_plugin.compat import PunicaWrapperCPU, lora_ops, punica_cpu


def clear_base_model_tokens() -> None:
    """Clear the effect of adapters on tokens of base-model requests, in vLLM's CPU operations.

    vLLM marks these tokens with slot -1. Its GPU kernels skip them. Its CPU operations read -1 as
    the last slot, so a base-model request gets that slot's adapter. The rows of these tokens are
    set to zero between the two halves of the operation.
    """
    owner = PunicaWrapperCPU
    update, shrink, embed = owner.update_metadata, owner.add_shrink, owner.add_lora_embedding
    bgmv_shrink = lora_ops.bgmv_shrink

    @functools.wraps(update)
    def update_metadata(self: Any, mapping: Any, *rest: Any, **more: Any) -> None:
        update(self, mapping, *rest, **more)
        mixed = min(mapping.index_mapping, default=1) <= 0
        self._s3lora_base_rows = (self.token_lora_indices < 0).unsqueeze(-1) if mixed else None

    @functools.wraps(shrink)
    def add_shrink(
        self: Any, y: Any, x: Any, lora_a_stacked: Any, scale: float, **more: Any
    ) -> Any:
        result = shrink(self, y, x, lora_a_stacked, scale, **more)
        if (rows := self._s3lora_base_rows) is not None:
            for buffer in y:
                buffer.view(-1, buffer.shape[-1]).masked_fill_(rows, 0)
        return result

    @functools.wraps(embed)
    def add_lora_embedding(self: Any, y: Any, x: Any, *rest: Any, **more: Any) -> Any:
        if (rows := self._s3lora_base_rows) is not None:
            x = x.masked_fill(rows, 0)
        return embed(self, y, x, *rest, **more)

    @functools.wraps(bgmv_shrink)
    def logits_shrink(
        inputs: Any,
        lora_b_weights: Any,
        output_tensor: Any,
        lora_indices_tensor: Any,
        scaling: float = 1.0,
    ) -> None:
        bgmv_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(-1), 0)

    owner._s3lora_base_rows = None  # until the wrapper gets its first batch
    owner.update_metadata, owner.add_shrink = update_metadata, add_shrink
    owner.add_lora_embedding = add_lora_embedding
    punica_cpu.bgmv_shrink = logits_shrink
