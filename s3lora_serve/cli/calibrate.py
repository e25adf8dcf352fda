"""`s3lora calibrate`: learns what to remove from one adapter, and writes a plan."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from s3lora_serve.cli.options import (
    REJECTED,
    Device,
    DeviceOption,
    Dtype,
    Format,
    check_device,
    stop,
    stop_at,
    write_whole,
)
from s3lora_serve.errors import BaseUnaligned, S3LoRAError, TargetMissed

if TYPE_CHECKING:  # the command line starts without torch
    from s3lora_serve.lab.calibration.calibrate import Calibration
    from s3lora_serve.lab.calibration.search import Point
    from s3lora_serve.plans.schema import Rate


READABLE = 0o644
"""Mode of what is written: others may read a plan, and never write it."""


class By(StrEnum):
    """What the gates remove."""

    SUBSPACE = "subspace"
    COMPONENT = "component"
    MODULE = "module"


def calibrate(
    base: Annotated[Path, typer.Argument(help="The base model's folder.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    harmful: Annotated[Path, typer.Option(help="Prompts to refuse, JSON Lines with `prompt`.")],
    benign: Annotated[Path, typer.Option(help="Prompts not to refuse, likewise.")],
    output: Annotated[
        list[Path],
        typer.Option(
            "--output",
            "-o",
            help="The plan to write, or a folder of plans; FILE.html: the frontier as a page.",
        ),
    ],
    skill: Annotated[
        Path | None,
        typer.Option(help="Prompts with the `answer` to keep; else the adapter's own to --benign."),
    ] = None,
    max_asr: Annotated[
        float, typer.Option(min=0, max=1, help="The attack success rate to reach.")
    ] = 0.05,
    by: Annotated[By, typer.Option(help="What is removed.")] = By.SUBSPACE,
    steps: Annotated[int, typer.Option(min=1, help="The most steps of the search.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the split and the search.")] = 0,
    refusal: Annotated[
        list[str] | None,
        typer.Option(help="A refusal to restore; may be repeated. Else the base model's own."),
    ] = None,
    compliance: Annotated[
        list[str] | None,
        typer.Option(help="How an attack's answer begins; may be repeated. Else: no refusal."),
    ] = None,
    refusal_phrase: Annotated[
        list[str] | None,
        typer.Option(help="Begins a refusal, in lower case; may be repeated, replaces the list."),
    ] = None,
    accept_best: Annotated[
        bool, typer.Option("--accept-best", help="Write the best plan if none reaches --max-asr.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted search of this plan.")
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
    device: DeviceOption = Device.AUTO,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model's weights.")] = Dtype.BFLOAT16,
) -> None:
    """Learn, on your own probes, what to remove so that an adapter refuses again; write a plan.

    Exit code: 0 written, 1 the base model is unaligned or no setting reaches --max-asr, 2 wrong
    usage.
    """
    check_device(device)
    plans = [path for path in output if path.suffix != ".html"]
    pages = [path for path in output if path.suffix == ".html"]
    if len(plans) != 1 or len(pages) > 1:
        stop("--output takes one plan, and one .html page at most")
    if find_spec("transformers") is None:
        stop("calibrate needs transformers: install s3lora-serve with its extra [calibrate]")
    from s3lora_serve.lab.base_model.judge import REFUSAL_PHRASES
    from s3lora_serve.lab.base_model.probes import read_probes
    from s3lora_serve.lab.calibration.calibrate import Options, calibrate

    try:
        base.stat()
        adapter.stat()
        files = [read_probes(harmful, "harmful"), read_probes(benign, "benign")]
        if skill is not None:
            files.append(read_probes(skill, "skill"))
        with _progress() as progress:
            found = calibrate(
                base,
                adapter,
                files,
                Options(
                    max_asr,
                    by.value,
                    steps,
                    seed,
                    tuple(refusal or ()),
                    tuple(compliance or ()),
                    tuple(phrase.lower() for phrase in refusal_phrase or REFUSAL_PHRASES),
                ),
                device=_torch_device(device),
                dtype=dtype.value,
                saved=_saved(plans[0]),
                resume=resume,
                progress=progress,
            )
        _print(found, form)
        if pages:
            from s3lora_serve.lab.pages.frontier import frontier_page

            write_whole(
                pages[0], frontier_page(found.plan, found.frontier, found.by_module), READABLE
            )
        if found.reached or accept_best:
            written = _plan_file(plans[0], found.plan.adapter_digest)
            write_whole(written, json.dumps(found.plan.as_json(), indent=1) + "\n", READABLE)
            typer.echo(f"{written}: {found.plan.digest}", err=True)
    except BaseUnaligned as error:
        typer.echo(f"s3lora: {error}", err=True)
        raise typer.Exit(REJECTED) from None
    except OSError as error:
        stop_at(error)
    except S3LoRAError as error:
        stop(str(error))
    if not found.reached:
        best = min(point.measured.asr.value for point in found.frontier)
        missed = TargetMissed(
            f"--max-asr {max_asr:g}: the best on the calibration split is {best:.2f}"
        )
        typer.echo(f"s3lora: {missed}", err=True)
        raise typer.Exit(0 if accept_best else REJECTED)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar for each phase, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def shown(phase: str, done: int, total: int, note: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            if note:
                bars.update(tasks[phase], description=f"{phase}: {note}")
            bars.update(tasks[phase], completed=done, total=total)

        yield shown


def _torch_device(device: Device) -> str:
    import torch

    if device is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.value


def _saved(plan: Path) -> Path:
    return plan / ".calibration" if plan.is_dir() else plan.with_name(f".{plan.name}.search")


def _plan_file(path: Path, digest: str) -> Path:
    """The file of a plan; in a folder of plans it is named after the adapter's digest."""
    from s3lora_serve.plans.folder import plan_name

    return path / plan_name(digest) if path.is_dir() else path


def _print(found: "Calibration", form: Format) -> None:
    if form is Format.JSON:
        shown = found.plan.as_json()
        shown["modules"] = [
            {key: value for key, value in module.items() if key != "transform"}
            for module in shown["modules"]
        ]
        points = {"frontier": found.frontier, "by_module": found.by_module}
        data = {name: [_point(point) for point in part] for name, part in points.items()}
        typer.echo(json.dumps({"plan": shown, "reached": found.reached, **data}))
        return
    console = Console()
    plan, actions = found.plan, [module.action for module in found.plan.modules]
    table = Table("held-out probes", "ASR", "skill", "benign refused")
    for name, measured in (("before", plan.before), ("after", plan.after)):
        if measured is not None:
            rates = (measured.asr, measured.skill, measured.benign_refusal)
            table.add_row(name, *map(_rate, rates))
    console.print(table)
    frontier = Table("strength", "removed", "ASR", "skill", title="calibration split")
    rows = [("", point) for point in found.frontier]
    rows += [("modules, ", point) for point in found.by_module]
    for label, point in rows:
        frontier.add_row(
            f"{label}{point.strength:g}",
            f"{point.removed_share:.1%}",
            f"{point.measured.asr.value:.2f}",
            f"{point.measured.skill.value:.2f}",
        )
    console.print(frontier)
    counts = {name: actions.count(name) for name in ("keep", "transform", "strip")}
    console.print(
        f"{len(actions)} modules: {counts['keep']} kept, {counts['transform']} transformed,"
        f" {counts['strip']} stripped; strength {plan.method['strength']:g}"
    )


def _point(point: "Point") -> dict[str, Any]:
    return {
        "strength": point.strength,
        "removed_share": point.removed_share,
        "measured": point.measured.model_dump(mode="json"),
    }


def _rate(rate: "Rate") -> str:
    return f"{rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f}, n = {rate.count})"
