"""The path that each adapter was registered with, for a worker's log and audit log.

A request names a stored copy, which registrants of equal content share.
"""

from typing import Any


class RegisteredPaths:
    """Paths by adapter id, from registration until the engine removes the adapter."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, str, str]] = {}  # name, stored copy, path

    def add(self, adapter_id: int, name: str, stored: str, path: str) -> None:
        """Keep the path of an adapter of this id and name, which is served from a stored copy."""
        self._known[adapter_id] = name, stored, path

    def of(self, request: Any) -> str:
        """The path that the adapter was registered with; the request's own if none is known."""
        name, stored, path = self._known.get(request.lora_int_id, ("", "", ""))
        same = (name, stored) == (request.lora_name, request.lora_path)
        return path if same else str(request.lora_path)

    def remove(self, adapter_id: int) -> None:
        """Forget an adapter."""
        self._known.pop(adapter_id, None)
