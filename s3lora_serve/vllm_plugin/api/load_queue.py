"""The queue for work on adapters: bounded, and fair between tenants."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from s3lora_serve.errors import QueueFull

MAX_WAITING = 256
"""Tasks that wait at the same time. Ours: more than a start of a fleet asks for at once."""

WAITING_SECONDS = 60.0
"""Longest wait for a place. Ours: clients and proxies commonly give up after a minute."""

RETRY_SECONDS = 10
"""When a load that found the queue full is worth another try. Ours."""


class LoadQueue:
    """A number of places, given to tenants in turn.

    While there are two places or more, no tenant has all of them: a tenant's long loads do not hold
    up another tenant's. No tenant has more than half of the queue.
    """

    def __init__(
        self,
        places: int,
        max_waiting: int = MAX_WAITING,
        seconds: float = WAITING_SECONDS,
        on_change: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Give out `places`; `on_change` gets the number of those that wait."""
        self._free = places
        self._each = max(1, places - 1)  # places that one tenant may have
        self._max_waiting = max_waiting
        self._seconds = seconds
        self._on_change = on_change
        self._paused = 0  # pauses that have not ended: no place is given
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def enter(self, tenant: str) -> None:
        """Wait for a place, which `leave` gives back.

        Raises:
            QueueFull: too many wait already, or no place was free in time.
        """
        count = self.waiting
        own = len(self._waiting.get(tenant, ()))
        if count >= self._max_waiting or own >= max(1, self._max_waiting // 2):
            raise QueueFull(f"{count} loads wait already, {own} of them of {tenant!r}")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give_places()
        try:
            async with asyncio.timeout(self._seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave(tenant)  # the place came at the same moment
            else:
                self._remove(tenant, turn)
            if isinstance(error, TimeoutError):
                raise QueueFull(f"no place was free for {self._seconds:g} s") from None
            raise

    def leave(self, tenant: str, pause: float = 0.0) -> None:
        """Give a place back; for `pause` seconds nobody gets one."""
        if pause > 0:
            self._paused += 1
            asyncio.get_running_loop().call_later(pause, self._end_pause)
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._give_places()

    def _end_pause(self) -> None:
        self._paused -= 1
        self._give_places()

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Within this context the tenant has a place.

        Raises:
            QueueFull: as `enter`.
        """
        await self.enter(tenant)
        try:
            yield
        finally:
            self.leave(tenant)

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return sum(map(len, self._waiting.values()))

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing has a place."""
        return not self._waiting and not self._running

    def _give_places(self) -> None:
        if self._paused:
            return
        while self._free and (tenant := self._next()) is not None:
            turns = self._waiting[tenant]
            turns.popleft().set_result(None)
            self._free -= 1
            self._running[tenant] += 1
            self._waiting.move_to_end(tenant)
            if not turns:
                del self._waiting[tenant]
        self._on_change(self.waiting)

    def _next(self) -> str | None:
        """The tenant whose turn it is; None if no waiting tenant may have another place."""
        return next((one for one in self._waiting if self._running[one] < self._each), None)

    def _remove(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[tenant]
        turns.remove(turn)
        if not turns:
            del self._waiting[tenant]
        self._on_change(self.waiting)
