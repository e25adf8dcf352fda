"""Options, exit codes and error exits that the commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn, TypeAlias

import typer

from s3lora_serve.errors import BaseUnaligned, S3LoRAError
from s3lora_serve.scorer_names import COMPARED

REJECTED, USAGE = 1, 2
"""Exit codes; 0 is the third. docs/reference.md lists them."""


class Device(StrEnum):
    """Where to score."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


ScorerName = StrEnum("ScorerName", {name: name for name in COMPARED})  # type: ignore[misc]
"""The index to score with; svd and spsvd are slow, and refused by a server."""


class Format(StrEnum):
    """How to print, where there are two ways."""

    TABLE = "table"
    JSON = "json"


class Dtype(StrEnum):
    """A dtype of weights."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


PolicyOption: TypeAlias = Annotated[
    Path | None, typer.Option(help="Policy file.", envvar="S3LORA_POLICY")
]
ReferenceOption: TypeAlias = Annotated[
    Path | None, typer.Option(help="An alignment reference, in the place of the policy's.")
]
StatisticsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--repair", help="Statistics to repair with, in the place of the policy's."),
]
DeviceOption: TypeAlias = Annotated[
    Device, typer.Option(help="Where to score.", envvar="S3LORA_DEVICE")
]


ModelDeviceOption: TypeAlias = Annotated[
    Device, typer.Option(help="Where the model runs; auto: CUDA where there is any.")
]


def torch_device(device: Device) -> str:
    """Where a base model runs. `auto` is CUDA where there is any: a model is slow elsewhere.

    That of scoring is the CPU (`spectral.scorer.resolve_device`).
    """
    import torch  # takes seconds

    if device is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.value


def check_device(device: Device) -> None:
    """Stop if CUDA is asked for and missing; otherwise every adapter would be rejected."""
    if device is Device.CUDA:
        import torch  # takes seconds

        if not torch.cuda.is_available():
            stop("--device cuda: torch finds no CUDA device here")


@contextmanager
def refusals_stop() -> Iterator[None]:
    """Exit as `stop` does on what the system or this package refuses within this context.

    A base model that complies with harmful prompts is a result, with the code of a rejection.
    """
    try:
        yield
    except BaseUnaligned as error:
        typer.echo(f"s3lora: {error}", err=True)
        raise typer.Exit(REJECTED) from None
    except OSError as error:
        stop_at(error)
    except S3LoRAError as error:
        stop(str(error))


def check_url(url: str) -> None:
    """Stop if a server's URL is none of HTTP."""
    if not url.startswith(("http://", "https://")):
        stop(f"{url}: expected http://HOST:PORT")


def stop(problem: str) -> NoReturn:
    """Print a problem and exit with the code of wrong usage."""
    typer.echo(f"s3lora: {problem}", err=True)
    raise typer.Exit(USAGE)


def stop_at(error: OSError) -> NoReturn:
    """Exit as `stop` does, for a file that cannot be read or written."""
    if error.filename is None:  # our own: its text says all
        stop(str(error))
    stop(f"{str(error.filename)[:200]}: {error.strerror}")


def write_whole(file: Path, text: str, mode: int | None = None) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text)
        if mode is not None:
            part.chmod(mode)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
