"""Which slots of a LoRA layer hold weights that act."""

from collections.abc import Callable
from typing import Any

from s3lora_serve.vllm_plugin import patches
from s3lora_serve.vllm_plugin.engine.packed_slices import weights_given

EVERY = -1
"""All slots, as a set of them in the bits of a number."""


class SlotsWithWeights:
    """One LoRA layer: the slots in which each slice (q, k, v of qkv) has weights, as bits."""

    def __init__(self, layer: Any, on_change: Callable[[], None] = lambda: None) -> None:
        """Follow what vLLM puts into the layer's slots; `on_change` is called after each."""
        self._on_change = on_change
        stacked = layer.lora_b_stacked
        self._held = [EVERY] * (len(stacked) if isinstance(stacked, tuple) else 1)
        patches.wrap_method(layer, "set_lora", self._set)
        patches.wrap_method(layer, "reset_lora", self._reset)

    def needed(self, slots: int) -> list[bool]:
        """Which slices have weights in at least one of these slots."""
        return [bool(held & slots) for held in self._held]

    def held(self, count: int) -> list[bool]:
        """Whether any slice has weights, for each of the first `count` slots."""
        slots = 0
        for each in self._held:
            slots |= each
        return [bool(slots & 1 << slot) for slot in range(count)]

    def _set(self, original: Callable[..., None], index: int, lora_a: Any, lora_b: Any) -> None:
        held = [True] * len(self._held)
        try:
            original(index, lora_a, lora_b)
            held = weights_given(lora_a, lora_b, len(self._held))
        finally:  # the original resets the slot first, and may fail after that
            self._note(index, held)

    def _reset(self, original: Callable[..., None], index: int) -> None:
        original(index)
        self._note(index, [False] * len(self._held))

    def _note(self, index: int, held: list[bool]) -> None:
        bit = 1 << index
        self._held = [
            slots | bit if now else slots & ~bit
            for slots, now in zip(self._held, held, strict=True)
        ]
        self._on_change()
