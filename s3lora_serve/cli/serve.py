"""`s3lora serve`: starts vLLM's API server under the gate, or refuses to start it unguarded."""

import os
from typing import Annotated

import typer

from s3lora_serve.cli.options import stop
from s3lora_serve.errors import S3LoRAError
from s3lora_serve.launcher import supervisor
from s3lora_serve.launcher.checks import checks
from s3lora_serve.launcher.server_files import ServerFiles
from s3lora_serve.launcher.vllm_command import (
    EXTENSION,
    GUARDED_WORKER,
    command,
    environment,
    extension_of,
)
from s3lora_serve.policy.file import serving_policy
from s3lora_serve.settings import load_settings


def serve(
    context: typer.Context, model: Annotated[str, typer.Argument(help="Model to serve.")]
) -> None:
    """Start vLLM's API server under the gate; all further arguments are vLLM's.

    Exit code: vLLM's own, or 2 if the server would not be guarded.
    """
    failed = [check for check in checks(context.args) if not check.passed]
    for check in failed:
        typer.echo(f"s3lora: {check.name}: {check.detail}", err=True)
    # `environment` adds the plugin to VLLM_PLUGINS: that it is missing there stops nothing.
    if any(check.essential and check.name != "VLLM_PLUGINS" for check in failed):
        stop("the server would not be guarded, so it is not started")
    settings = load_settings()
    extension = extension_of(context.args)
    if extension and extension != GUARDED_WORKER and serving_policy(settings).required:
        stop(f"required: true needs {EXTENSION} {GUARDED_WORKER}, got {extension}")
    try:
        with ServerFiles(settings) as files:
            status = supervisor.run(
                command(model, context.args), environment(os.environ, files.metrics)
            )
    except S3LoRAError as error:
        stop(str(error))
    supervisor.end_as(status)
