"""Requests for adapters that act nowhere are the base model's to the engine.

Their batch takes the captured graph without LoRA, they need no slot, and they share the base
model's prefix cache. One process decides for all ranks, which must run the same graph.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import StoreDamaged
from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.store.stored_copy import is_servable, read_verdict
from s3lora_serve.vllm_plugin.bounded_map import remember


class RequestsWithoutEffect:
    """Tells such requests apart, by the stored copies that they name."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._nothing_left: OrderedDict[Path, bool] = OrderedDict()

    def __call__(self, lora_request: Any) -> bool:
        """Whether no rank lets this request's adapter act. Raises nothing.

        A refused adapter is not among them until a worker has reported its quarantine.
        """
        path = self._store.find(lora_request.lora_path)
        if path is None:
            return False
        return self._has_nothing_left(path) or self._store.is_quarantined(path)

    def _has_nothing_left(self, path: Path) -> bool:
        """Whether the verdict of a stored copy strips all modules; its content never changes."""
        if path not in self._nothing_left:
            try:
                verdict = read_verdict(path)
            except StoreDamaged:  # the worker finds and reports it
                return False
            remember(self._nothing_left, path, _strips_everything(verdict))
        return self._nothing_left[path]


def _strips_everything(verdict: Verdict) -> bool:
    whole = len(verdict.stripped) == len(verdict.modules)
    return is_servable(verdict) and verdict.mode == "enforce" and whole and not verdict.unscored
