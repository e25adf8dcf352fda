"""Run a test program in a process of its own and read the one result that it prints."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.support.server import base_environment

MARK = "FOUND "


def print_result(result: Any) -> None:
    """Print the result of a program that `run_program` runs, as JSON after MARK."""
    print(MARK + json.dumps(result), flush=True)


def run_program(
    *arguments: object, seconds: float | None = 400, **variables: str
) -> tuple[Any, str]:
    """Run Python with these arguments and variables: its result, and all of its output."""
    environment: Mapping[str, str] = base_environment() | variables
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(line.removeprefix(MARK)), done.stdout + done.stderr
