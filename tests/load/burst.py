"""A burst of loads beside base-model requests: what ends, what the others wait, what is left.

Half of the clients may leave before their answer. Run by `make load`.
"""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.load.watch import processes
from tests.support.server import Server

TOKENS = 100
STREAMS = 2
"""Base-model requests at the same time, each asked again as soon as it has ended."""

HEALTH_SECONDS = 0.2
SETTLING_SECONDS = 60.0


@dataclass
class Burst:
    """What was seen while a number of loads was asked for at once."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # until the last load had ended
    gaps_before: list[float] = field(default_factory=list)  # seconds between base-model tokens
    gaps: list[float] = field(default_factory=list)  # the same, while adapters are loaded
    health: list[float] = field(default_factory=list)  # seconds of each answer of /health
    left: dict[str, tuple[float, float]] = field(default_factory=dict)  # before → a minute later

    @property
    def p99_ratio(self) -> float:
        """p99 between base-model tokens, while adapters are loaded over before."""
        return p99(self.gaps) / p99(self.gaps_before)


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds."""
    return statistics.quantiles(values, n=100)[98]


def burst(
    server: Server,
    adapters: Sequence[tuple[str, Path]],
    *,
    leaving: float = 0.0,
    quiet_seconds: float = 20.0,
    store: Path,
    settling: float = SETTLING_SECONDS,
) -> Burst:
    """Load all adapters (name, folder) at once; a share of the clients leaves at random."""
    return asyncio.run(_burst(server, adapters, leaving, quiet_seconds, store, settling))


async def _burst(
    server: Server,
    adapters: Sequence[tuple[str, Path]],
    leaving: float,
    quiet_seconds: float,
    store: Path,
    settling: float,
) -> Burst:
    found = Burst()
    before = leftovers(server, store)
    unlimited = aiohttp.TCPConnector(limit=0, force_close=True)
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        server.url(""), connector=unlimited, headers=headers, timeout=timeout
    ) as client:
        over = asyncio.Event()
        streams = [asyncio.create_task(_stream(client, found, over)) for _ in range(STREAMS)]
        probing = asyncio.create_task(_probe(client, found, over))
        await asyncio.sleep(quiet_seconds)
        found.gaps_before, found.gaps = found.gaps, found.gaps_before
        generator = random.Random(29)
        started = time.monotonic()
        await asyncio.gather(
            *(_load(client, found, name, folder, generator, leaving) for name, folder in adapters)
        )
        found.seconds = time.monotonic() - started
        over.set()
        await asyncio.gather(*streams, probing)
        for name, _ in adapters:
            async with client.post("/v1/unload_lora_adapter", json={"lora_name": name}) as gone:
                await gone.read()
    await asyncio.sleep(settling)
    after = leftovers(server, store)
    found.left = {what: (before[what], after[what]) for what in before}
    return found


async def _load(
    client: aiohttp.ClientSession,
    found: Burst,
    name: str,
    folder: Path,
    generator: random.Random,
    leaving: float,
) -> None:
    body = {"lora_name": name, "lora_path": str(folder)}
    wait = generator.uniform(0, 5) if generator.random() < leaving else None
    try:
        async with asyncio.timeout(wait):
            async with client.post("/v1/load_lora_adapter", json=body) as answer:
                await answer.read()
                found.statuses[str(answer.status)] += 1
    except TimeoutError:
        found.statuses["left"] += 1


async def _stream(client: aiohttp.ClientSession, found: Burst, over: asyncio.Event) -> None:
    body = {
        "model": "base", "prompt": "Q: What is the capital of Peru? A:", "max_tokens": TOKENS,
        "temperature": 0, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    while not over.is_set():
        async with client.post("/v1/completions", json=body) as answer:
            assert answer.status == 200
            last: float | None = None
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if last is not None:
                        found.gaps.append(now - last)
                    last = now


async def _probe(client: aiohttp.ClientSession, found: Burst, over: asyncio.Event) -> None:
    while not over.is_set():
        started = time.perf_counter()
        async with client.get("/health") as answer:
            assert answer.status == 200
        found.health.append(time.perf_counter() - started)
        await asyncio.sleep(HEALTH_SECONDS)


def leftovers(server: Server, store: Path) -> dict[str, float]:
    """What a load may leave: pins, private copies and reports in the store, threads, preloads."""
    assert server.process is not None
    own = [file for folder in store.glob("s3lora-*/process-*") for file in folder.iterdir()]
    kinds: dict[str, Any] = {
        "pins": [file for file in own if file.name.startswith("pin-")],
        "reports": [file for file in own if file.name.startswith("loaded-")],
        "private copies": [file for file in own if file.is_dir()],
    }
    threads = sum(len(list((one / "task").iterdir())) for one in processes(server.process.pid))
    metrics = server.metrics()
    return {name: float(len(files)) for name, files in kinds.items()} | {
        "threads": float(threads),
        "preloads": metrics.get("s3lora_preloads", 0.0),
        "waiting loads": metrics.get("s3lora_waiting_loads", 0.0),
    }
