"""`s3lora strip`: writes an adapter without its sharp modules, or as its plan says."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import s3lora_serve  # imports torch on first use, which takes seconds
from s3lora_serve.admission.policy_files import check_named_statistics
from s3lora_serve.cli.options import (
    REJECTED,
    Device,
    DeviceOption,
    PolicyOption,
    ReferenceOption,
    ScorerName,
    StatisticsOption,
    check_device,
    refusals_stop,
)
from s3lora_serve.cli.tables import VerdictTable
from s3lora_serve.policy.file import effective_policy, with_options

if TYPE_CHECKING:
    from s3lora_serve.plans.schema import Plan


class Action(StrEnum):
    """What happens to the modules that the policy picks."""

    STRIP = "strip"
    PROJECT = "project"


def strip(
    source: Annotated[Path, typer.Argument(help="An adapter folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    policy: PolicyOption = None,
    device: DeviceOption = Device.AUTO,
    plan: Annotated[
        Path | None, typer.Option(help="A plan for this adapter, in the place of the policy's.")
    ] = None,
    action: Annotated[
        Action | None, typer.Option(help="What happens to the modules that the policy picks.")
    ] = None,
    scorer: Annotated[
        ScorerName | None, typer.Option(help="Another index than the policy's.")
    ] = None,
    reference: ReferenceOption = None,
    repair: StatisticsOption = None,
) -> None:
    """Write an adapter without its sharp modules, whole or not at all; the source is only read.

    With --action project their updates are projected on what alignment changed (safe-lora).

    With a plan, the plan says which modules are left out, and which are written transformed.

    With --repair the modules that are not left out are projected away from what harmful prompts
    produce in the base model.

    Beside it, s3lora-provenance.json says what it was made of and by which policy.

    Exit code: 0 written, 1 rejected or nothing left, 2 wrong usage.
    """
    check_device(device)
    with refusals_stop():
        source.stat()
        chosen = effective_policy(file=policy)
        chosen = with_options(chosen, scorer, reference, action, repair)
        check_named_statistics(chosen)
        used = _read_plan(plan) if plan else None
        verdict = s3lora_serve.strip_adapter(source, target, chosen, device.value, used)
    table = VerdictTable()
    table.add(verdict)
    table.end()
    if not target.exists():
        typer.echo("s3lora: nothing is written", err=True)
        raise typer.Exit(REJECTED)


def _read_plan(file: Path) -> "Plan":
    from s3lora_serve.plans.file import read_plan  # imports torch, which takes seconds

    return read_plan(file)
