"""What a worker has loaded under each adapter id: a stored copy, or nothing and why."""

from collections import OrderedDict
from collections.abc import Callable, Collection

from s3lora_serve.errors import Reason
from s3lora_serve.vllm_plugin.bounded_map import MAX_ENTRIES, remember


class LoadOutcomes:
    """Store keys and refusals by adapter id.

    Keys of adapters that the engine holds are never forgotten. Of adapters that were evicted the
    last MAX_ENTRIES are known, so that a load of one of them is known as a re-load.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[int, str] = OrderedDict()
        self._refusals: OrderedDict[int, Reason] = OrderedDict()

    def key(self, adapter_id: int) -> str | None:
        """The key of the copy that was loaded last under an id."""
        return self._keys.get(adapter_id)

    def refusal(self, adapter_id: int) -> Reason | None:
        """Why an adapter without effect was loaded under an id; None if it was not."""
        return self._refusals.get(adapter_id)

    def loaded(self, adapter_id: int, key: str, held: Callable[[], Collection[int]]) -> None:
        """Note what was loaded; `held` says which ids the engine holds."""
        self._refusals.pop(adapter_id, None)
        self._keys[adapter_id] = key
        self._keys.move_to_end(adapter_id)
        if len(self._keys) > MAX_ENTRIES:
            kept = {*held(), adapter_id}
            evicted = [one for one in self._keys if one not in kept]
            for one in evicted[: len(self._keys) - MAX_ENTRIES]:
                del self._keys[one]

    def refused(self, adapter_id: int, reason: Reason) -> None:
        """Note that an adapter without effect was loaded."""
        remember(self._refusals, adapter_id, reason)
        self._keys.pop(adapter_id, None)
