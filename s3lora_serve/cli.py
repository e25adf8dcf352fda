"""The command line: `s3lora`. Exit codes are the product's contract; see the README."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from s3lora_serve import launcher, remote, tables
from s3lora_serve.cli_audit import audit_app
from s3lora_serve.cli_common import stop
from s3lora_serve.cli_report import write_report
from s3lora_serve.cli_scan import scan
from s3lora_serve.cli_strip import strip
from s3lora_serve.cli_summary import write_summary
from s3lora_serve.errors import S3LoRAError
from s3lora_serve.guarding import Check, checks, device
from s3lora_serve.launcher import EXTENSION, GUARDED_WORKER, extension_of
from s3lora_serve.policy_file import effective_policy, serving_policy
from s3lora_serve.settings import load_settings
from s3lora_serve.supervisor import end_as

app = typer.Typer(
    no_args_is_help=True,
    help="The gate for LoRA adapters served by vLLM: score, strip, refuse.",
    pretty_exceptions_show_locals=False,
)
policy_app = typer.Typer(no_args_is_help=True, help="Work on policy files.")
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")

app.command()(scan)
app.command()(strip)
app.command("report")(write_report)
app.command("summary")(write_summary)


class RecheckFormat(StrEnum):
    """How `recheck` prints."""

    TABLE = "table"
    JSON = "json"


@policy_app.command("check")
def policy_check(file: Annotated[Path, typer.Argument(help="YAML or JSON policy.")]) -> None:
    """Validate a policy and print the effective one, the environment over the file.

    Exit code: 0, or 2 if it is not valid.
    """
    try:
        checked = effective_policy(file=file)
    except S3LoRAError as error:
        stop(str(error))
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
        stop("the server would not be guarded, so it is not started")
    theirs = extension_of(context.args)
    if theirs and theirs != GUARDED_WORKER and serving_policy(load_settings()).required:
        stop(f"required: true needs {EXTENSION} {GUARDED_WORKER}, got {theirs}")
    try:
        status = launcher.serve(model, context.args, load_settings())
    except S3LoRAError as error:
        stop(str(error))
    end_as(status)


@app.command()
def recheck(
    url: Annotated[str, typer.Argument(help="A guarded server: http://HOST:PORT.")],
    key: Annotated[
        str | None, typer.Option("--api-key", help="Its API key.", envvar="VLLM_API_KEY")
    ] = None,
    form: Annotated[RecheckFormat, typer.Option("--format", help="How to print.")] = (
        RecheckFormat.TABLE
    ),
) -> None:
    """Say which served adapters the policy in force would decide otherwise; nothing changes.

    Exit code: 0 none, 1 at least one, 2 wrong usage, or the server did not answer.
    """
    try:
        found = remote.recheck(url, key)
    except remote.ServerSilent as error:
        stop(str(error))
    if form is RecheckFormat.JSON:
        typer.echo(json.dumps(found, indent=2))
    else:
        tables.print_recheck(found["adapters"])
    raise typer.Exit(1 if any(each["differs"] for each in found["adapters"]) else 0)


@app.command()
def doctor() -> None:
    """Say whether a server started in this environment would be guarded. Exit code: 0, or 1."""
    found = [*checks(), device(), _skipping()]
    tables.print_checks(found)
    unguarded = [check for check in found if not check.passed and check.guards]
    raise typer.Exit(1 if unguarded else 0)


def _skipping() -> Check:
    """Whether modules without weights cost nothing; vLLM is imported to see."""
    try:
        if not load_settings().skip_stripped:
            return Check("skipping", True, "no: S3LORA_SKIP_STRIPPED is off")
        from s3lora_serve.vllm_plugin.contract import skipping_obstacle

        obstacle = skipping_obstacle()
    except Exception as error:  # noqa: BLE001 - whatever is wrong, other checks say it better
        obstacle = f"{type(error).__name__}: {error}"
    if obstacle:
        return Check("skipping", False, f"no, the gate does without: {obstacle}", essential=False)
    return Check("skipping", True, "modules without weights are skipped where vLLM runs eagerly")
