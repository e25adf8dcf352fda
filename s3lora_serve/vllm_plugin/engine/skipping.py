"""Skipping of LoRA operations in which no adapter of the batch has weights.

vLLM computes them over zeros. A layer or wrapper that is unknown here is always computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from s3lora_serve.vllm_plugin import compat, contract, patches
from s3lora_serve.vllm_plugin.engine import captured_skipping
from s3lora_serve.vllm_plugin.engine.packed_slices import runs
from s3lora_serve.vllm_plugin.engine.slots_with_weights import EVERY, SlotsWithWeights


class Skipping:
    """Skipping in one worker."""

    def __init__(self, *, wanted: bool, captured: bool = False) -> None:
        """`wanted`: skip where Python runs in each step; `captured`: in other models too."""
        self._wanted = wanted
        self._captured = captured

    def activate(self, manager: Any, vllm_config: Any) -> None:
        """Start to skip; called when the LoRA modules exist and hold no adapter yet."""
        if why := self._obstacle(manager, vllm_config):
            compat.logger.info("s3lora: modules without weights cost what others do: %s", why)
            return
        layers = compat.known_layers(manager)
        if not compat.runs_eagerly(vllm_config):
            captured_skipping.install(manager, vllm_config, layers)
            compat.logger.info("s3lora: modules without weights are skipped in captured graphs")
            return
        # The identity of its stacked weights names a layer in `_Batch`.
        modules = {id(layer.lora_b_stacked): SlotsWithWeights(layer) for layer in layers}
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
            if not self._captured:
                return (
                    "the model is compiled or captured in graphs, which do the same in every batch"
                    " (S3LORA_SKIP_CAPTURED, not yet measured on a GPU, changes that)"
                )
            if problem := contract.captured_skipping_obstacle(manager, vllm_config):
                return problem
        return contract.skipping_obstacle(manager)


@dataclass(slots=True)
class _Batch:
    """The batch of one of vLLM's Punica wrappers: which slots have tokens in it."""

    modules: dict[int, SlotsWithWeights]
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
