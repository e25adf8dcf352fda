"""`LLM.generate` and whoever else drives vLLM's `LLMEngine`: adapters are decided on before the
engine hears of the request, so that its prefix-cache blocks belong to the admitted content."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from s3lora_serve.errors import AdapterRejected
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.desk import Desk, remember
from s3lora_serve.vllm_plugin.registrar import IN_PLACE_IDS


@dataclass(frozen=True, slots=True)
class _Known:
    number: int
    path: Path  # in the store


class OfflineDoor:
    """The gate of a process that holds an `LLMEngine`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._ids = count(IN_PLACE_IDS)
        self._known: OrderedDict[tuple[str, int, str], _Known] = OrderedDict()
        self._shapes: set[tuple[int, int]] | None = None

    def admitted(self, engine: Any, request: Any) -> Any:
        """The request for the copy that was decided on; a refused one is quarantined by the worker.

        A folder is read at first use and when it is loaded in place, never again between.
        """
        if self._desk.store.find(request.lora_path) is not None:
            return request
        origin = (request.lora_name, request.lora_int_id, request.lora_path)
        known = self._known.get(origin)
        if known is None or request.load_inplace:
            try:
                path = self._decide(engine, request)
            except AdapterRejected:
                path = None
            if path is None:
                return request  # the worker decides, and has its say in log, metrics and audit
            known = self._replaced(origin, known, path)
        return compat.with_path(request, known.path, known.number)

    def _replaced(self, origin: tuple[str, int, str], before: _Known | None, path: Path) -> _Known:
        """Other content gets an id of its own: requests under way end as they began."""
        if before is None:
            known = _Known(origin[1], path)
        elif before.path == path:
            known = before
        else:
            known = _Known(next(self._ids), path)
        forgotten = remember(self._known, origin, known)
        for old in (before, forgotten):
            if old is not None:
                self._desk.store.release(old.path)
        return known

    def _decide(self, engine: Any, request: Any) -> Path | None:
        folder = compat.adapter_folder(request, download=not self._desk.policy.limits.roots)
        if folder is None:
            return None
        verdict, path = self._desk.decide(
            folder,
            request.lora_name,
            compat.base_model(engine.vllm_config),
            self._model_shapes(engine),
            keep_refused=True,
        )
        self._desk.recorder.decided(verdict, "engine")
        return path

    def _model_shapes(self, engine: Any) -> set[tuple[int, int]]:
        if self._shapes is None:
            ranks = engine.collective_rpc("s3lora_model")
            places = {tuple(place) for rank in ranks for place in rank["places"]}
            self._desk.recorder.metrics.know_model(places)
            self._shapes = {(m, n) for rank in ranks for m, n in rank["shapes"]}
        return self._shapes
