"""Calls to every worker of every engine; with data parallelism there are several engines."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from s3lora_serve.errors import GateFailed
from s3lora_serve.vllm_plugin import compat

ALIVE_SECONDS = 1.0
"""Interval between checks that the engine which is to answer has not ended."""

T = TypeVar("T")


async def call_workers(engine: Any, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """The answers of all workers to one of the methods in `engine/worker_methods.py`.

    Raises:
        GateFailed: the engine ended before it answered.
    """
    calls = compat.calls_to_all_engines(engine, method, args)
    answers = await while_alive(engine, asyncio.gather(*calls))
    return [answer for part in answers for answer in part]


async def while_alive(engine: Any, call: Awaitable[T]) -> T:
    """The engine's answer to a call. vLLM leaves calls to an engine that has ended unanswered.

    Raises:
        GateFailed: the engine ended before it answered.
    """
    answer = asyncio.ensure_future(call)
    while not (await asyncio.wait([answer], timeout=ALIVE_SECONDS))[0]:
        if engine.errored:
            answer.cancel()
            raise GateFailed("the engine has ended")
    return await answer


def is_first_server(engine: Any) -> bool:
    """Whether this API server process reports for all that share its engines."""
    return compat.client_index(engine) == 0
