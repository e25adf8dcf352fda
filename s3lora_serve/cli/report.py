"""`s3lora report`: writes a page on one adapter or two."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from s3lora_serve.admission.verdict import Decision
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
    stop,
)
from s3lora_serve.pages.report import EvaluatedSetting, Subject, report
from s3lora_serve.policy.file import effective_policy, with_options
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy

COUNTS = (0, 5, 10, 15, 20)
"""Numbers of stripped modules that the paper compares (its pruning hyperparameter τ)."""


def write_report(
    paths: Annotated[list[Path], typer.Argument(help="An adapter folder, or two to compare.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
    policy: PolicyOption = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Indices to rank by as well: mas-svd,svd,spsvd,safe-lora,splora."),
    ] = None,
    reference: ReferenceOption = None,
    repair: StatisticsOption = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="What s3lora evaluate wrote of the adapter; for two, twice."),
    ] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Write one self-contained page: heat map, spectra, what is stripped and why.

    Exit code: 0 admitted or stripped, 1 at least one rejected, 2 wrong usage.
    """
    check_device(device)
    if len(paths) > 2:
        stop(f"a report is on one adapter or on two, not on {len(paths)}")
    scorers = [name for name in (compare or "").split(",") if name]
    if unknown := [name for name in scorers if name not in list(ScorerName)]:
        stop(f"--compare knows {', '.join(ScorerName)}; got {unknown[0]!r}")
    if evaluation and len(evaluation) != len(paths):
        stop(f"--evaluation: {len(evaluation)} files for {len(paths)} adapters")
    with refusals_stop():
        for path in paths:
            path.stat()
        chosen = effective_policy(file=policy)
        chosen = with_options(chosen, reference=reference, statistics=repair)
        subjects = [_subject(path, chosen, scorers, device.value) for path in paths]
        for place, file in enumerate(evaluation or ()):
            subjects[place] = replace(subjects[place], evaluated=_evaluated(file))
        output.write_text(report(subjects))
    typer.echo(f"{output}: {', '.join(one.verdict.decision.value for one in subjects)}")
    if any(one.verdict.decision is Decision.REJECTED for one in subjects):
        raise typer.Exit(REJECTED)


def _subject(path: Path, policy: Policy, scorers: list[str], device: str) -> Subject:
    from s3lora_serve.admission.admit import admit  # imports torch, which takes seconds

    name = path.absolute().name
    admission = admit(path, name, policy, device=device)
    own = policy.for_adapter(name, str(path.resolve()), None, admission.verdict.vouchers.signer)
    # The rules for this adapter would replace the counts that are compared.
    own = own.model_copy(update={"rules": ()})
    others = [other for other in scorers if other != policy.scorer.name]
    by_scorer = {other: with_options(own, other, action="strip") for other in others}
    by_choice = {"index": admission.under(own)}
    if policy.repair is not None and admission.verdict.selected_by == "plan":
        alone = policy.model_copy(update={"plans": None, "require_plan": False})
        by_choice = {"repair": admit(path, name, alone, device=device).verdict} | by_choice
    if admission.verdict.selected_by != "index":
        by_choice = {admission.verdict.selected_by: admission.verdict} | by_choice
    return Subject(
        admission.verdict,
        {
            count: admission.under(own.model_copy(update={"strip": Strip(top_k=count)}))
            for count in COUNTS
        },
        {
            other: admit(path, name, policy, device=device).verdict
            for other, policy in by_scorer.items()
        },
        by_choice,
    )


def _evaluated(file: Path) -> list[EvaluatedSetting]:
    """The settings of a sweep, in its order.

    Raises:
        EvaluationFailed: the file is no sweep's.
    """
    from s3lora_serve.lab.evaluation.results import read_sweep

    sweep = read_sweep(file)
    return [
        EvaluatedSetting(
            trial.label,
            trial.changed,
            trial.mean("asr"),
            trial.mean("utility"),
            trial.label == sweep.recommended,
        )
        for trial in sweep.trials
    ]
