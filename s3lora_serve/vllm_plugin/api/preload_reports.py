"""Reports of workers that they have preloaded a stored copy: files that they create in the store.

The store is what an API server and its workers share, so a worker can report without a call, and
none has to wait in the engine's loop.
"""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from s3lora_serve.errors import DeadlinePassed

SHORTEST_SECONDS, LONGEST_SECONDS = 0.002, 0.05
"""Interval between looks at a local folder. A small copy takes 10 ms, a large one seconds."""


async def reported(folder: Path, names: Collection[str], seconds: float) -> None:
    """Wait until every report exists in the folder, and remove them.

    Raises:
        DeadlinePassed: one is missing after this time.
    """
    pause = SHORTEST_SECONDS
    missing = set(names)
    try:
        async with asyncio.timeout(seconds):
            while missing := {name for name in missing if not (folder / name).exists()}:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_SECONDS)
    except TimeoutError:
        raise DeadlinePassed(
            f"{len(missing)} of {len(names)} workers did not load it within {seconds:g} s"
            " (limits.load_seconds)"
        ) from None
    finally:
        for name in names:
            with suppress(OSError):
                (folder / name).unlink()
