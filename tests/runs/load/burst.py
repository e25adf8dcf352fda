"""A burst of loads beside base-model requests: what ends, what the others wait, what is left.

Half of the clients may leave before their answer. They are in a process of their own, so that
those who measure do not wait for them. Run by `make load`.
"""

import asyncio
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.runs.load.standstill import Moment, overlap, standstills
from tests.runs.load.watch import processes
from tests.support.server import Server

TOKENS = 100
STREAMS = 2
"""Base-model requests at the same time, each asked again as soon as it has ended."""

MORE_THREADS = 8
"""Threads of the gate's pools, which start when first used and stay."""

HEALTH_SECONDS = 0.2
APART_SECONDS = 0.005
"""Between the first moments of two clients: kernels drop some of 200 connections in one moment, and
those clients try again only after seconds."""

LEAVING_SECONDS = 5.0
"""Longest patience of a client that leaves."""

SETTLING_SECONDS = 60.0


@dataclass
class Burst:
    """What was seen while a number of loads was asked for at once."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # until the last load had ended
    gaps: list[Moment] = field(default_factory=list)  # between base-model tokens
    gaps_without: list[Moment] = field(default_factory=list)  # the same before and after the loads
    health: list[Moment] = field(default_factory=list)  # of each answer of /health
    standstills: list[Moment] = field(default_factory=list)  # of the machine
    left: dict[str, tuple[float, float]] = field(default_factory=dict)  # before → a minute later

    @property
    def p99_ratio(self) -> float:
        """p99 between base-model tokens, while adapters are loaded over before and after.

        Without the gaps in which the machine stood still.
        """
        return p99(self._undisturbed(self.gaps)) / p99(self._undisturbed(self.gaps_without))

    def _undisturbed(self, gaps: Sequence[Moment]) -> list[Moment]:
        return [gap for gap in gaps if not overlap(gap, self.standstills)]

    @property
    def slowest_health(self) -> float:
        """Seconds of the slowest answer of /health, less those in which the machine stood still."""
        return max(
            end - start - overlap((start, end), self.standstills) for start, end in self.health
        )


def p99(moments: Sequence[Moment]) -> float:
    """The seconds that one in a hundred moments exceeds."""
    return statistics.quantiles([end - start for start, end in moments], n=100)[98]


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
    with standstills() as moments:
        found = asyncio.run(_burst(server, adapters, leaving, quiet_seconds, store, settling))
    found.standstills = moments
    return found


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
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    own = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, own) as loaders:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(loaders, int)  # it has started
        async with aiohttp.ClientSession(server.url(""), headers=headers) as client:
            over = asyncio.Event()
            streams = [asyncio.create_task(_stream(client, found, over)) for _ in range(STREAMS)]
            probing = asyncio.create_task(_probe(client, found, over))
            await asyncio.sleep(quiet_seconds)
            found.gaps_without, found.gaps = found.gaps, []
            found.health.clear()
            started = time.monotonic()
            found.statuses = await loop.run_in_executor(
                loaders, _load_all, server.url(""), headers, adapters, leaving
            )
            found.seconds = time.monotonic() - started
            gaps, found.gaps = found.gaps, found.gaps_without  # machines change their pace
            await asyncio.sleep(quiet_seconds)
            found.gaps = gaps
            over.set()
            await asyncio.gather(*streams, probing)
    for name, _ in adapters:
        server.unload(name)
    await asyncio.sleep(settling)
    after = leftovers(server, store)
    found.left = {what: (before[what], after[what]) for what in before}
    return found


def _load_all(
    url: str, headers: Mapping[str, str], adapters: Sequence[tuple[str, Path]], leaving: float
) -> Counter[str]:
    """The statuses of all loads, in a process of their own."""

    async def run() -> Counter[str]:
        statuses: Counter[str] = Counter()
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        generator = random.Random(29)
        async with aiohttp.ClientSession(
            url, connector=connector, headers=headers, timeout=timeout
        ) as client:
            waits = [
                generator.uniform(0, LEAVING_SECONDS) if generator.random() < leaving else None
                for _ in adapters
            ]
            await asyncio.gather(
                *(
                    _load(client, statuses, name, folder, APART_SECONDS * place, wait)
                    for place, ((name, folder), wait) in enumerate(
                        zip(adapters, waits, strict=True)
                    )
                )
            )
        return statuses

    return asyncio.run(run())


async def _load(
    client: aiohttp.ClientSession,
    statuses: Counter[str],
    name: str,
    folder: Path,
    start: float,
    wait: float | None,
) -> None:
    body = {"lora_name": name, "lora_path": str(folder)}
    await asyncio.sleep(start)
    try:
        async with asyncio.timeout(wait):
            async with client.post("/v1/load_lora_adapter", json=body) as answer:
                await answer.read()
                statuses[str(answer.status)] += 1
    except TimeoutError:
        statuses["left"] += 1


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
                    now = time.monotonic()
                    if last is not None:
                        found.gaps.append((last, now))
                    last = now


async def _probe(client: aiohttp.ClientSession, found: Burst, over: asyncio.Event) -> None:
    while not over.is_set():
        started = time.monotonic()
        async with client.get("/health") as answer:
            assert answer.status == 200
        found.health.append((started, time.monotonic()))
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


BOUNDS = {"p99 over that without": 1.5, "/health, s": 1.0, "seconds": 120.0}
"""What a run is held to, on two cores."""


def problems(found: Burst, count: int) -> list[str]:
    """What a burst of `count` loads shows that it must not."""
    answered = sum(found.statuses[one] for one in ("200", "429", "left"))
    figures = {
        "p99 over that without": found.p99_ratio,
        "/health, s": found.slowest_health,
        "seconds": found.seconds,
    }
    wrong = [f"{what}: {value:.2f}" for what, value in figures.items() if value > BOUNDS[what]]
    if answered != count:
        wrong.append(f"{count} loads got {dict(found.statuses)}")
    for what, (early, late) in found.left.items():
        if late > early + (MORE_THREADS if what == "threads" else 0):
            wrong.append(f"{what}: {early:g} → {late:g}")
    return wrong
