"""Programs on an engine of their own, and the one thing they found."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.support.server import base_environment

MARK = "FOUND "


def tell(found: Any) -> None:
    """Print, in such a program, what it found."""
    print(MARK + json.dumps(found), flush=True)


def told(*arguments: object, seconds: float | None = 400, **around: str) -> tuple[Any, str]:
    """Run Python with these arguments and variables: what it found, and all that it said."""
    environment: Mapping[str, str] = base_environment() | around
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(line.removeprefix(MARK)), done.stdout + done.stderr
