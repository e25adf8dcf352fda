"""`s3lora strip`: write what the gate would serve of an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from s3lora_serve.cli_common import REJECTED, Device, DeviceOption, PolicyOption, stop, stop_at
from s3lora_serve.errors import S3LoRAError
from s3lora_serve.policy_file import effective_policy
from s3lora_serve.strip import strip_adapter
from s3lora_serve.tables import VerdictTable


def strip(
    source: Annotated[Path, typer.Argument(help="An adapter folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    policy: PolicyOption = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Write an adapter without its sharp modules, whole or not at all; the source is only read.

    Beside it, s3lora-provenance.json says what it was made of and by which policy.

    Exit code: 0 written, 1 rejected or nothing left, 2 wrong usage.
    """
    try:
        source.stat()
        verdict = strip_adapter(source, target, effective_policy(file=policy), device.value)
    except FileExistsError as error:
        stop(str(error))
    except OSError as error:
        stop_at(error)
    except S3LoRAError as error:
        stop(str(error))
    table = VerdictTable()
    table.add(verdict)
    table.end()
    if not target.exists():
        typer.echo("s3lora: nothing is written", err=True)
        raise typer.Exit(REJECTED)
