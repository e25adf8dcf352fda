"""Stored copies that a process keeps pinned for as long as it knows what they stand for."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.vllm_plugin.bounded_map import remember
from s3lora_serve.vllm_plugin.replacement_ids import ReplacementIds


@dataclass(frozen=True, slots=True)
class PinnedCopy:
    """A stored copy, and the id that the engine knows it by."""

    adapter_id: int  # vLLM's lora_int_id
    path: Path


class PinnedCopies:
    """The stored copies of what requests name and no API server registered, by what they say.

    The pin of a copy goes with its entry.
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._ids = ReplacementIds()
        self._copies: OrderedDict[tuple[str, int, str], PinnedCopy] = OrderedDict()

    def get(self, request: Any) -> PinnedCopy | None:
        """The copy of an adapter that was admitted before."""
        return self._copies.get(_named(request))

    def put(self, request: Any, path: Path) -> PinnedCopy:
        """Keep a pinned copy; the one that it replaces is unpinned."""
        named, before = _named(request), self.get(request)
        adapter_id = request.lora_int_id if before is None else self._ids.of(path, before)
        now = PinnedCopy(adapter_id, path)
        for old in (before, remember(self._copies, named, now)):
            if old is not None:
                self._store.unpin(old.path)
        return now


def _named(request: Any) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path
