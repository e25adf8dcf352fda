"""`s3lora policy check`: validates a policy file."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from s3lora_serve.admission.policy_files import check_policy_files
from s3lora_serve.cli.options import stop
from s3lora_serve.errors import S3LoRAError
from s3lora_serve.policy.file import effective_policy, policy_bytes, says_its_end

policy_app = typer.Typer(no_args_is_help=True, help="Work on policy files.")


@policy_app.command("check")
def policy_check(file: Annotated[Path, typer.Argument(help="YAML or JSON policy.")]) -> None:
    """Validate a policy and print the effective one, the environment over the file.

    Its folder of plans, its alignment reference, its statistics and its signers' keys are checked
    too, as a server does at start.

    Exit code: 0, or 2 if it is not valid.
    """
    try:
        checked = effective_policy(file=file)
        check_policy_files(checked)
    except S3LoRAError as error:
        stop(str(error))
    typer.echo(yaml.safe_dump(checked.as_json(), sort_keys=False), nl=False)
    typer.echo(f"# digest: {checked.digest}")
    if not says_its_end(policy_bytes(file)):
        typer.echo("no running server takes this file up: its last line is not `...`", err=True)
