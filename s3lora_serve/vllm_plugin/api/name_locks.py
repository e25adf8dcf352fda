"""A lock for each name that is being loaded or looked up, in the place of vLLM's.

vLLM keeps a lock for every model name that any request ever had: clients choose the names and their
length, and nothing is freed.
"""

from asyncio import Lock
from weakref import WeakValueDictionary


class NameLocks(WeakValueDictionary[str, Lock]):
    """Locks by name; each lives while somebody holds it or waits for it."""

    def __getitem__(self, name: str) -> Lock:
        return self.setdefault(name, Lock())
