"""`s3lora doctor`: checks whether a server started in this environment would be guarded."""

import typer

from s3lora_serve.cli import tables
from s3lora_serve.launcher.check import Check
from s3lora_serve.launcher.checks import checks, device
from s3lora_serve.settings import load_settings


def doctor() -> None:
    """Say whether a server started in this environment would be guarded. Exit code: 0, or 1."""
    found = [*checks(), device(), _skipping()]
    tables.print_checks(found)
    unguarded = [check for check in found if not check.passed and check.guards]
    raise typer.Exit(1 if unguarded else 0)


def _skipping() -> Check:
    """Whether modules without weights are skipped; imports vLLM."""
    try:
        settings = load_settings()
        if not settings.skip_stripped:
            return Check("skipping", True, "no: S3LORA_SKIP_STRIPPED is off")
        from s3lora_serve.vllm_plugin.contract import skipping_obstacle

        obstacle = skipping_obstacle()
    except Exception as error:  # noqa: BLE001 - other checks report what is wrong
        obstacle = f"{type(error).__name__}: {error}"
    if obstacle:
        return Check("skipping", False, f"no, the gate does without: {obstacle}", essential=False)
    where = "where vLLM runs eagerly"
    if settings.skip_captured:
        where += ", and on a GPU in captured graphs"
    return Check("skipping", True, f"modules without weights are skipped {where}")
