"""Maps of bounded size: tenants choose adapter names, so no map may grow with them."""

from collections import OrderedDict
from typing import TypeVar

MAX_ENTRIES = 1000
"""Adapters that a process remembers something about."""

K = TypeVar("K")
V = TypeVar("V")


def remember(entries: OrderedDict[K, V], key: K, value: V) -> V | None:
    """Put an entry last and drop the first one above MAX_ENTRIES; return the dropped value."""
    entries[key] = value
    entries.move_to_end(key)
    return entries.popitem(last=False)[1] if len(entries) > MAX_ENTRIES else None
