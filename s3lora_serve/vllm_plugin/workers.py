"""Questions to every worker: with data parallelism there are several engines of them."""

import asyncio
from typing import Any


async def ask_workers(engine: Any, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """What each worker of each engine answers to one of the methods that the hook gave them.

    NB: AsyncLLM.collective_rpc asks all engines too, and returns the answers of the first alone.
    """
    client = engine.engine_core
    asked = method, None, args, None  # as AsyncMPClient.collective_rpc_async does: no time limit
    parts = await asyncio.gather(
        *(
            client._call_utility_async("collective_rpc", *asked, engine=one)
            for one in client.core_engines
        )
    )
    return [answer for part in parts for answer in part]


def is_first_server(engine: Any) -> bool:
    """Whether this API server process speaks for all that share its engines."""
    return bool(engine.engine_core.client_index == 0)
