"""The command line: `s3lora`. Exit codes are the product's contract; see the README."""

import json
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
import yaml

from s3lora_serve import remote, tables
from s3lora_serve.cli_audit import audit_app
from s3lora_serve.errors import S3LoRAError
from s3lora_serve.guarding import checks
from s3lora_serve.intake import CONFIG_NAME, OTHER_FORMATS, WEIGHTS_NAME
from s3lora_serve.launcher import EXTENSION, GUARDED_WORKER, command, environment, extension_of
from s3lora_serve.policy_file import effective_policy, serving_policy
from s3lora_serve.scan import scan_adapter
from s3lora_serve.settings import load_settings
from s3lora_serve.verdict import Decision, Verdict

app = typer.Typer(
    no_args_is_help=True,
    help="The gate for LoRA adapters served by vLLM: score, strip, refuse.",
    pretty_exceptions_show_locals=False,
)
policy_app = typer.Typer(no_args_is_help=True, help="Work on policy files.")
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")

REJECTED, USAGE = 1, 2


class Format(StrEnum):
    """How `scan` prints."""

    TABLE = "table"
    JSON = "json"


class Scorer(StrEnum):
    """The index `scan` scores with; all but the first are slow."""

    MAS_SVD = "mas-svd"
    SVD = "svd"
    SPSVD = "spsvd"


class Device(StrEnum):
    """Where `scan` scores."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def scan(
    paths: Annotated[list[Path], typer.Argument(help="Adapter folders, or folders of adapters.")],
    output: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file.", envvar="S3LORA_POLICY")
    ] = None,
    scorer: Annotated[
        Scorer | None, typer.Option(help="Another index than the policy's, to compare.")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Where to score.", envvar="S3LORA_DEVICE")
    ] = Device.AUTO,
) -> None:
    """Say what the gate would do with each adapter; nothing is written.

    Exit code: 0 admitted or stripped, 1 at least one rejected, 2 wrong usage.
    """
    for path in paths:
        try:
            path.stat()
        except OSError as error:
            _stop(f"{str(path)[:200]}: {error.strerror}")
    if device is Device.CUDA and not torch.cuda.is_available():
        _stop("--device cuda: torch finds no CUDA device here")
    try:
        chosen = effective_policy(file=policy)
    except S3LoRAError as error:
        _stop(str(error))
    if scorer is not None:
        choice = chosen.scorer.model_copy(update={"name": scorer.value})
        chosen = chosen.model_copy(update={"scorer": choice})
    verdicts = [
        scan_adapter(folder, chosen, device.value) for path in paths for folder in _adapters(path)
    ]
    if output is Format.JSON:
        typer.echo(json.dumps({"adapters": [verdict.as_json() for verdict in verdicts]}, indent=2))
    else:
        tables.print_verdicts(verdicts)
    raise typer.Exit(REJECTED if any(_rejected(verdict) for verdict in verdicts) else 0)


@policy_app.command("check")
def policy_check(file: Annotated[Path, typer.Argument(help="YAML or JSON policy.")]) -> None:
    """Validate a policy and print the effective one, the environment over the file.

    Exit code: 0, or 2 if it is not valid.
    """
    try:
        checked = effective_policy(file=file)
    except S3LoRAError as error:
        _stop(str(error))
    typer.echo(yaml.safe_dump(checked.as_json(), sort_keys=False), nl=False)
    typer.echo(f"# digest: {checked.digest}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context, model: Annotated[str, typer.Argument(help="Model to serve.")]
) -> None:
    """Start vLLM's API server under the gate; all further arguments are vLLM's.

    Exit code: vLLM's own, or 2 if the server would not be guarded.
    """
    failed = [check for check in checks() if not check.passed]
    for check in failed:
        typer.echo(f"s3lora: {check.name}: {check.detail}", err=True)
    # VLLM_PLUGINS is mended below, so that it may not list us yet is no reason to stop.
    if any(check.essential and check.name != "VLLM_PLUGINS" for check in failed):
        _stop("the server would not be guarded, so it is not started")
    theirs = extension_of(context.args)
    if theirs and theirs != GUARDED_WORKER and serving_policy(load_settings()).required:
        _stop(f"required: true needs {EXTENSION} {GUARDED_WORKER}, got {theirs}")
    line = command(model, context.args)
    os.execve(line[0], line, environment(os.environ))  # noqa: S606 - signals and exit code are vLLM's


@app.command()
def recheck(
    url: Annotated[str, typer.Argument(help="A guarded server: http://HOST:PORT.")],
    key: Annotated[
        str | None, typer.Option("--api-key", help="Its API key.", envvar="VLLM_API_KEY")
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
) -> None:
    """Say which served adapters the policy in force would decide otherwise; nothing changes.

    Exit code: 0 none, 1 at least one, 2 wrong usage, or the server did not answer.
    """
    try:
        found = remote.recheck(url, key)
    except remote.ServerSilent as error:
        _stop(str(error))
    if output is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
    else:
        tables.print_recheck(found["adapters"])
    raise typer.Exit(1 if any(each["differs"] for each in found["adapters"]) else 0)


@app.command()
def doctor() -> None:
    """Say whether a server started in this environment would be guarded. Exit code: 0, or 1."""
    found = list(checks())
    tables.print_checks(found)
    unguarded = [check for check in found if not check.passed and check.guards]
    raise typer.Exit(1 if unguarded else 0)


def _adapters(path: Path) -> Iterator[Path]:
    """The adapter folders under `path`; itself if it is one, or if there are none."""
    marks = (CONFIG_NAME, WEIGHTS_NAME, *OTHER_FORMATS)
    if not path.is_dir() or any((path / mark).exists() for mark in marks):
        yield path
        return
    found = sorted(_walk(path, set(marks)))
    yield from found or [path]


def _walk(top: Path, marks: set[str]) -> Iterator[Path]:
    """Folders that hold one of the files, links followed, each real folder once."""

    def unreadable(error: OSError) -> None:
        _stop(f"{error.filename}: {error.strerror}")

    seen: set[str] = set()
    for name, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if marks.intersection(files):
            yield Path(name)


def _rejected(verdict: Verdict) -> bool:
    return verdict.decision is Decision.REJECTED


def _stop(problem: str) -> NoReturn:
    typer.echo(f"s3lora: {problem}", err=True)
    raise typer.Exit(USAGE)
