"""Stored copies that a process keeps pinned for as long as it knows what they stand for."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.vllm_plugin.bounded_map import remember

FIRST_REPLACEMENT_ID = 2**30
"""Ids from here on are for replaced adapters. vLLM counts its own from 1, in 32 bits."""


class ReplacementIds:
    """Ids of adapters that take another's place.

    Same content keeps its id, other content gets a new one: running requests finish with the
    adapter they began with.
    """

    def __init__(self) -> None:
        self._ids = count(FIRST_REPLACEMENT_ID)

    def new(self) -> int:
        """An id that no adapter has had."""
        return next(self._ids)

    def of(self, path: Path, before: "PinnedCopy | None") -> int:
        """The id under which a stored copy takes the place of the one before."""
        return before.adapter_id if before is not None and before.path == path else self.new()


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
