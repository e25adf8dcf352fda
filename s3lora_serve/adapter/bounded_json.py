"""Parse a tenant's JSON text, whose number of values is bounded before anything is built of it.

Python's parser lets no other thread run meanwhile, and 16 MB hold 5.6 million empty lists.
"""

import json
from collections.abc import Callable
from typing import Any

_MARKS = (b",", b":", b"[", b"{")
"""Each value but the first follows one of these. In text they are counted too."""


def parse_json(
    text: bytes, most: int, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text that has at most `most` values, keys included.

    `pairs_hook` makes an object of its pairs, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: it is not JSON, holds too many values, or is nested too deeply.
    """
    values = sum(map(text.count, _MARKS)) + 1
    if values > most:
        raise ValueError(f"it holds up to {values} values, over {most}")
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
