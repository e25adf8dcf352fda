"""What the commands share: exit codes, options, how to stop."""

from enum import StrEnum
from typing import NoReturn

import typer

REJECTED, USAGE = 1, 2
"""Exit codes; 0 is the third. See the README."""


class Device(StrEnum):
    """Where to score."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Scorer(StrEnum):
    """The index to score with; all but the first are slow, and refused by a server."""

    MAS_SVD = "mas-svd"
    SVD = "svd"
    SPSVD = "spsvd"


def stop(problem: str) -> NoReturn:
    """End with the exit code of wrong usage."""
    typer.echo(f"s3lora: {problem}", err=True)
    raise typer.Exit(USAGE)
