"""Ids of adapters that take another's place, in the API server and beside an `LLMEngine`."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopy

FIRST_REPLACEMENT_ID = 2**30
"""Ids from here on are for replaced adapters. vLLM counts its own from 1, in 32 bits."""


class ReplacementIds:
    """Same content keeps its id, other content gets a new one.

    So running requests finish with the adapter they began with.
    """

    def __init__(self) -> None:
        self._ids = count(FIRST_REPLACEMENT_ID)

    def new(self) -> int:
        """An id that no adapter has had."""
        return next(self._ids)

    def of(self, path: Path, before: "PinnedCopy | None") -> int:
        """The id under which a stored copy takes the place of the one before."""
        return before.adapter_id if before is not None and before.path == path else self.new()
