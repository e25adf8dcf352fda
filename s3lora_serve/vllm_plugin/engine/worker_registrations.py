"""What a worker knows of registrations: the path that each adapter was registered with.

A request names a stored copy, which registrants of equal content share.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class WorkerRegistration:
    """One adapter that an API server has registered, or is registering."""

    name: str
    stored: str  # path of the stored copy
    path: str  # that it was registered with
    is_under_way: bool  # the API server asks for the refusal of its load, and handles it


class WorkerRegistrations:
    """Registrations by adapter id, until the engine removes the adapter."""

    def __init__(self) -> None:
        self._known: dict[int, WorkerRegistration] = {}

    def add(
        self, adapter_id: int, name: str, stored: str, path: str, *, is_under_way: bool
    ) -> None:
        """Note an adapter of this id and name, which is served from a stored copy.

        One that is served already stays so: each API server registers the static adapters.
        """
        before = self._known.get(adapter_id)
        if before is not None and (before.name, before.stored) == (name, stored):
            is_under_way = is_under_way and before.is_under_way
        self._known[adapter_id] = WorkerRegistration(name, stored, path, is_under_way)

    def end(self, adapter_id: int) -> None:
        """The API server knows what became of a load: from here on the worker answers for it."""
        if (known := self._known.get(adapter_id)) is not None:
            known.is_under_way = False

    def is_under_way(self, request: Any) -> bool:
        """Whether an API server is registering what a request names."""
        return (known := self._of(request)) is not None and known.is_under_way

    def path(self, request: Any) -> str:
        """The path that the adapter was registered with; the request's own if none is known."""
        return str(request.lora_path) if (known := self._of(request)) is None else known.path

    def remove(self, adapter_id: int) -> None:
        """Forget an adapter."""
        self._known.pop(adapter_id, None)

    def _of(self, request: Any) -> WorkerRegistration | None:
        known = self._known.get(request.lora_int_id)
        if known is None:
            return None
        same = (known.name, known.stored) == (request.lora_name, request.lora_path)
        return known if same else None
