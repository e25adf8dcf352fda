"""Calls to every worker of every engine; with data parallelism there are several engines."""

import asyncio
from typing import Any


async def call_workers(engine: Any, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """The answers of all workers to one of the methods in `engine/worker_methods.py`.

    NB: coupled to AsyncMPClient._call_utility_async. AsyncLLM.collective_rpc calls all engines too,
    and returns the answers of the first one only.
    """
    client = engine.engine_core
    call = method, None, args, None  # as AsyncMPClient.collective_rpc_async: no time limit
    answers = await asyncio.gather(
        *(
            client._call_utility_async("collective_rpc", *call, engine=one)
            for one in client.core_engines
        )
    )
    return [answer for part in answers for answer in part]


def is_first_server(engine: Any) -> bool:
    """Whether this API server process reports for all that share its engines."""
    return bool(engine.engine_core.client_index == 0)
