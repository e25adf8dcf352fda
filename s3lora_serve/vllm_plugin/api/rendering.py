"""Answers with many verdicts: rendered on a thread beside the server's loop, one adapter at a time.

A verdict has hundreds of modules, and a server thousands of verdicts. All answers share one thread,
and take turns in it after each adapter, so however many are asked for, tokens do not wait.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi.responses import Response, StreamingResponse

from s3lora_serve.admission.verdict import Verdict

T = TypeVar("T")
JSON = "application/json"

# Escapes keep a lone surrogate in a name from failing the whole answer.
dumps = partial(json.dumps, allow_nan=False, separators=(",", ":"))


class Rendering:
    """The thread on which one API server renders."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "s3lora-pages")

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """What `work` returns, called on the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def json(self, render: Callable[..., str], *args: Any) -> Response:
        """The answer with the JSON text that `render` returns, called on the thread."""
        return Response(await self.run(render, *args), media_type=JSON)

    def stream(
        self, fields: dict[str, Any], render: Callable[[T], str], adapters: Sequence[T]
    ) -> Response:
        """The answer with these fields and the list `adapters`, whose parts follow each other."""
        return StreamingResponse(self._parts(fields, render, adapters), media_type=JSON)

    async def _parts(
        self, fields: dict[str, Any], render: Callable[[T], str], adapters: Sequence[T]
    ) -> AsyncIterator[str]:
        yield dumps(fields)[:-1] + ',"adapters":['
        for number, adapter in enumerate(adapters):
            yield ("," if number else "") + await self.run(render, adapter)
        yield "]}"


def verdict_json(verdict: Verdict, *, spectra: bool = True) -> str:
    """A verdict as JSON text.

    Python's encoder lets no other thread run meanwhile, so it gets one module at a time.
    """
    fields = verdict.as_json(spectra=spectra)
    modules = ",".join(map(dumps, fields.pop("modules")))
    return f'{dumps(fields)[:-1]},"modules":[{modules}]}}'
