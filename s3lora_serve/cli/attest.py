"""`s3lora attest`: signs the verdict on an adapter, for gates that require it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from s3lora_serve.adapter.remote_storage import RemoteFolder, is_url
from s3lora_serve.cli.options import (
    REJECTED,
    Device,
    DeviceOption,
    PolicyOption,
    check_device,
    refusals_stop,
    stop,
    write_whole,
)
from s3lora_serve.policy.file import effective_policy
from s3lora_serve.policy.schema import Policy

PathArgument = Annotated[str, typer.Argument(help="An adapter folder, or a URL for fsspec.")]
KeyOption = Annotated[
    Path, typer.Option(help="A private key in PEM: Ed25519, ECDSA (P-256, P-384) or RSA.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="The file to write; else the policy's name for it, in PATH."
    ),
]
NameOption = Annotated[
    str | None, typer.Option(help="The adapter's name for rules; else its folder's.")
]
BaseModelOption = Annotated[str | None, typer.Option(help="The base model for rules.")]
PasswordOption = Annotated[
    str | None,
    typer.Option("--key-password", envvar="S3LORA_KEY_PASSWORD", help="Of an encrypted key."),
]


def attest(
    path: PathArgument,
    key: KeyOption,
    output: OutputOption = None,
    policy: PolicyOption = None,
    name: NameOption = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = Device.AUTO,
    password: PasswordOption = None,
) -> None:
    """Score an adapter and sign the verdict: an in-toto statement in a DSSE envelope.

    Exit code: 0 written, 1 rejected and nothing is written, 2 wrong usage.
    """
    if find_spec("securesystemslib") is None:
        stop("attest needs securesystemslib: install s3lora-serve with its extra [sign]")
    check_device(device)
    from s3lora_serve.offline.attest import attest_adapter  # imports torch, which takes seconds
    from s3lora_serve.signatures.envelope import private_key

    try:
        with refusals_stop():
            chosen = effective_policy(file=policy)
            folder, target = _folder(path), _target(path, output, chosen)
            own = private_key(key.read_bytes(), password)
            about = {"name": name, "base_model": base_model}
            verdict, envelope = attest_adapter(folder, own, chosen, device.value, **about)
            if envelope is not None:
                write_whole(target, json.dumps(envelope) + "\n")
    except ValueError as error:
        stop(f"--key {key}: {error}")
    if envelope is None:
        typer.echo(f"s3lora: nothing is written: {verdict.reason}", err=True)
        raise typer.Exit(REJECTED)
    typer.echo(f"{target}: {verdict.decision.value}, {len(verdict.stripped)} modules stripped")


def _folder(path: str) -> Path | RemoteFolder:
    if is_url(path):
        return RemoteFolder(path)
    Path(path).stat()
    return Path(path)


def _target(path: str, output: Path | None, policy: Policy) -> Path:
    if output is None and is_url(path):
        stop("name a file to write with --output: PATH is a URL")
    return output or Path(path) / policy.attestations.file
