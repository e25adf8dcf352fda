"""Step 7: registrations on a guarded server with requests under way, scored on CPU and device."""

import asyncio
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.runs.gpu.steps import DEVICE, ENVIRONMENT, ON_GPU, OUT, show
from tests.runs.gpu.steps.big_model import make_adapter, make_base
from tests.runs.gpu.steps.doors import ON_A_GPU, PACK
from tests.runs.gpu.steps.turns import turn
from tests.support.server import OPEN_LOADING, Server

ADAPTERS = 12 if ON_GPU else 2
QUIET_SECONDS = 4.0
STREAMS = 8 if ON_GPU else 1


class Streams:
    """Base-model requests one after the other in some streams, and the gaps between tokens."""

    def __init__(self, server: Server) -> None:
        self._url, self._over = server.url(""), threading.Event()
        self.gaps: list[float] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def take(self) -> list[float]:
        """The gaps since the last call, in milliseconds."""
        found, self.gaps = self.gaps, []
        return [1000 * gap for gap in found]

    async def _run(self) -> None:
        async with aiohttp.ClientSession(self._url) as client:
            await asyncio.gather(*(self._stream(client) for _ in range(STREAMS)))

    async def _stream(self, client: aiohttp.ClientSession) -> None:
        body = {
            "model": "base", "prompt": [5, 9, 11], "max_tokens": 200 if ON_GPU else 20,
            "temperature": 0, "stream": True, "ignore_eos": True,
        }  # fmt: skip
        while not self._over.is_set():
            async with client.post("/v1/completions", json=body) as answer:
                last = None
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        if last is not None:
                            self.gaps.append(now - last)
                        last = now


def p99(values: list[float]) -> float | None:
    """The value that one in a hundred exceeds."""
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else None


def make_server(folder: Path, kind: str, environment: dict[str, str]) -> Server:
    """A server with the big model, not started."""
    flags = ("--load-format", "dummy", *(("--dtype", "bfloat16") if ON_GPU else ()))
    state = folder / f"state {kind}"
    state.mkdir()
    own = OPEN_LOADING | ENVIRONMENT | {"S3LORA_STATE_DIR": str(state)} | environment
    return Server(
        folder / "base", OUT / f"loads {kind}.log".replace(" ", "-"),
        (*flags, *(ON_A_GPU if ON_GPU else ())), own,
        guarded=kind != "stock", one_process=not ON_GPU,
    )  # fmt: skip


def measure(server: Server, folder: Path) -> dict[str, Any]:
    """Load adapters beside streams on one server."""
    with Streams(server) as streams:
        time.sleep(QUIET_SECONDS)
        quiet, seconds, statuses = streams.take(), [], []
        for number in range(ADAPTERS):
            started = time.perf_counter()
            statuses.append(server.load(f"a{number}", folder / f"a{number}").status_code)
            seconds.append(time.perf_counter() - started)
        beside = streams.take()
    metrics = server.metrics() if server.guarded else {}
    return {
        "load, ms": [1000 * one for one in seconds], "statuses": statuses,
        "p50 before": statistics.median(quiet), "p99 before": p99(quiet), "p99 beside": p99(beside),
        "longest beside": max(beside),
        "metrics": {k: v for k, v in metrics.items() if "scoring_seconds_sum" in k and v},
    }  # fmt: skip


KINDS = {
    "scored on the CPU": {"S3LORA_DEVICE": "cpu"},
    "scored on the device": {"S3LORA_DEVICE": DEVICE},
    "stock": {"VLLM_PLUGINS": ""},
}


def main() -> None:
    """Start all servers, then measure one after the other."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work, ExitStack() as servers:
        folder = Path(work)
        make_base(folder / "base", PACK / "base")
        for number in range(ADAPTERS):
            make_adapter(folder / f"a{number}", number)
        made = {kind: make_server(folder, kind, environment) for kind, environment in KINDS.items()}
        for server in made.values():
            servers.callback(server.stop)
            server.start()
        for server in made.values():
            server.wait()
        with turn("loads"):
            for kind, server in made.items():
                found[kind] = measure(server, folder)
                show(found)


if __name__ == "__main__":
    main()
