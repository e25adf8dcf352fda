"""Skipping where no Python of ours runs in a step: in compiled models and captured graphs.

vLLM's GPU kernels end at once for an active adapter id of −1. All layers share one tensor of these
ids. Here each layer reads a row of its own, which has −1 where the adapter's slot has no weights in
that layer. A row keeps its address, as captured graphs need it, and is written outside of them.

A packed layer (qkv) has one row: it is computed if any of its slices has weights.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.vllm_plugin import compat, patches
from s3lora_serve.vllm_plugin.engine.slots_with_weights import SlotsWithWeights

CACHE_KEY = "s3lora_rows"
"""In vLLM's `additional_config`, which the key of its compile cache covers: a graph compiled
without rows reads the one tensor."""

NONE = -1
"""The id of no adapter."""


def install(manager: Any, vllm_config: Any, layers: Sequence[Any]) -> None:
    """Give each layer its own row of active ids, and keep them up to date."""
    vllm_config.additional_config[CACHE_KEY] = 1
    by_wrapper: dict[int, list[Any]] = {}
    for layer in layers:
        if compat.is_classification_head(layer):  # vLLM compares its wrapper with its own
            continue
        by_wrapper.setdefault(id(layer.punica_wrapper), []).append(layer)
    rows = [Rows(manager, members) for members in by_wrapper.values()]
    # vLLM writes no metadata while the batch's adapters and their slots are what they were.
    patches.wrap_method(compat.lora_manager(manager), "activate_adapter", partial(_activate, rows))


def _activate(rows: Sequence["Rows"], original: Callable[[int], bool], lora_id: int) -> bool:
    added = original(lora_id)
    if added:  # vLLM asks for each adapter in each step
        for each in rows:
            each.refresh()
    return added


def _aligned_rows(count: int, like: Tensor) -> Tensor:
    """(count, len(like)) of NONE, each row at 16 bytes as vLLM's own: kernels are compiled so."""
    width = -(-len(like) // 4) * 4
    rows = torch.full((count, width), NONE, dtype=like.dtype, device=like.device)
    return rows[:, : len(like)]


class Rows:
    """The rows of the layers of one of vLLM's Punica wrappers."""

    def __init__(self, manager: Any, layers: Sequence[Any]) -> None:
        self._manager = manager
        self._wrapper = wrapper = layers[0].punica_wrapper
        self._is_stale = True  # slots have changed since the device was told
        self._slots = [SlotsWithWeights(layer, self._note_change) for layer in layers]
        ids = [getattr(wrapper, name).active_lora_ids for name in compat.MAPPING_METADATA]
        self._rows = [_aligned_rows(len(layers), each) for each in ids]
        self._count = compat.slot_count(manager)
        self._all_held = True
        self._held = torch.ones(len(layers), self._count, dtype=torch.bool, device=ids[0].device)
        for i, layer in enumerate(layers):
            layer.set_mapping(self._with_own_row(wrapper, i))
        patches.wrap_method(wrapper, "update_metadata", self._update)

    def refresh(self) -> None:
        """Write all rows anew; no wait for the device."""
        if self._is_stale:
            self._read_slots()
        everything = self._all_held or compat.is_warming_up(self._manager)
        for name, rows in zip(compat.MAPPING_METADATA, self._rows, strict=True):
            ids = getattr(self._wrapper, name).active_lora_ids
            rows.copy_(ids.expand_as(rows) if everything else self._where_held(ids))

    def _where_held(self, ids: Tensor) -> Tensor:
        held = self._held.index_select(1, ids.clamp(0, self._count - 1))
        return torch.where(held, ids, NONE)

    def _read_slots(self) -> None:
        self._is_stale = False
        held = torch.tensor([slots.held(self._count) for slots in self._slots])
        used = compat.slots_in_use(self._manager)
        self._all_held = bool(held[:, used].all())
        self._held.copy_(held, non_blocking=True)

    def _note_change(self) -> None:
        self._is_stale = True

    def _update(self, original: Callable[..., None], *arguments: Any, **more: Any) -> None:
        original(*arguments, **more)
        self.refresh()

    def _with_own_row(self, wrapper: Any, place: int) -> Any:
        """The wrapper as one layer sees it. It shares all tensors except the row."""
        own = copy.copy(wrapper)
        for name, rows in zip(compat.MAPPING_METADATA, self._rows, strict=True):
            metadata = getattr(wrapper, name)
            setattr(own, name, dataclasses.replace(metadata, active_lora_ids=rows[place]))
        return own
