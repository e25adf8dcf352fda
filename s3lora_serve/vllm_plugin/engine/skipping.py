"""Skipping of LoRA operations in which no adapter of the batch has weights.

vLLM computes them over zeros. A layer or wrapper that is unknown here is always computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3lora_serve.vllm_plugin import compat, contract, patches
from s3lora_serve.vllm_plugin.engine.packed_slices import runs, weights_given

EVERY = -1
"""All slots, as a set of them in the bits of a number."""


class Skipping:
    """Skipping in one worker."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted

    def activate(self, manager: Any, vllm_config: Any) -> None:
        """Start to skip; called when the LoRA modules exist and hold no adapter yet."""
        if why := self._obstacle(manager, vllm_config):
            compat.logger.info("s3lora: modules without weights cost what others do: %s", why)
            return
        layers = compat.known_layers(manager)
        modules = {id(layer.lora_b_stacked): _Module(layer) for layer in layers}
        for wrapper in {
            id(layer.punica_wrapper): layer.punica_wrapper for layer in layers
        }.values():
            batch = _Batch(modules, in_one_call=not compat.adds_slice_by_slice(wrapper))
            patches.wrap_method(wrapper, "update_metadata", partial(batch.update, manager))
            patches.wrap_method(wrapper, "add_lora_linear", batch.add_linear)
            patches.wrap_method(wrapper, "add_lora_embedding", partial(batch.add_whole, 0))
            patches.wrap_method(wrapper, "add_lora_logits", partial(batch.add_whole, 1))
        compat.logger.info("s3lora: modules without weights are skipped")

    def _obstacle(self, manager: Any, vllm_config: Any) -> str | None:
        if not self._wanted:
            return "S3LORA_SKIP_STRIPPED is off"
        if not compat.runs_eagerly(vllm_config):
            return "the model is compiled or captured in graphs, which do the same in every batch"
        return contract.skipping_obstacle(manager)


class _Module:
    """One LoRA layer: the slots in which each slice (q, k, v of qkv) has weights, as bits."""

    def __init__(self, layer: Any) -> None:
        self.stacked = layer.lora_b_stacked  # its identity names the layer in `_Batch`
        self._held = [EVERY] * (len(self.stacked) if isinstance(self.stacked, tuple) else 1)
        patches.wrap_method(layer, "set_lora", self._set)
        patches.wrap_method(layer, "reset_lora", self._reset)

    def needed(self, slots: int) -> list[bool]:
        """Which slices have weights in at least one of these slots."""
        return [bool(held & slots) for held in self._held]

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


@dataclass(slots=True)
class _Batch:
    """The batch of one of vLLM's Punica wrappers: which slots have tokens in it."""

    modules: dict[int, _Module]
    in_one_call: bool  # one launch over a gap is cheaper than two
    slots: int = EVERY  # that have tokens

    def update(
        self,
        manager: Any,
        original: Callable[..., None],
        mapping: Any,
        lora_index_to_id: list[int | None],
        *rest: Any,
        **more: Any,
    ) -> None:
        """Read which slots have tokens in the new batch."""
        self.slots = EVERY
        original(mapping, lora_index_to_id, *rest, **more)
        # Warm-up adapters are zeros, and must take the time and memory of real ones.
        if not compat.is_warming_up(manager):
            ids = set(mapping.index_mapping)
            held = (1 << slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id in ids)
            self.slots = sum(held)

    def add_linear(
        self,
        original: Callable[..., None],
        y: Any,
        x: Any,
        lora_a_stacked: tuple[Any, ...],
        lora_b_stacked: tuple[Any, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **more: Any,
    ) -> None:
        """Add to y the result of the slices with weights for x."""
        needed = [True] if more.get("buffer") else self._needed(lora_b_stacked)
        if all(needed):
            original(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)
            return
        for first, end in runs(needed, in_one_call=self.in_one_call):
            run = slice(first, end)
            start = sum(output_slices[:first])
            stacked = lora_a_stacked[run], lora_b_stacked[run]
            original(y, x, *stacked, scale, output_slices[run], offset_start=start, **more)

    def add_whole(
        self, at: int, original: Callable[..., None], y: Any, x: Any, *rest: Any, **more: Any
    ) -> None:
        """Add to y the result of an embedding or a head for x, if it has weights.

        `at`: the index of `lora_b_stacked` in `rest`.
        """
        if len(rest) <= at or all(self._needed(rest[at])):
            original(y, x, *rest, **more)

    def _needed(self, lora_b_stacked: Any) -> list[bool]:
        """Which slices of the layer with these stacked weights have weights for this batch."""
        module = self.modules.get(id(lora_b_stacked))
        return module.needed(self.slots) if module else [True]
