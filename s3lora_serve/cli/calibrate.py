"""`s3lora calibrate`: learns what to remove from one adapter, and writes a plan."""

import json
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from s3lora_serve.cli.options import (
    REJECTED,
    Device,
    Dtype,
    Format,
    ModelDeviceOption,
    check_device,
    refusals_stop,
    stop,
    torch_device,
    write_whole,
)
from s3lora_serve.cli.progress import phase_bars
from s3lora_serve.errors import TargetMissed
from s3lora_serve.plans.defaults import MAX_ASR, STEPS

if TYPE_CHECKING:  # the command line starts without torch
    from s3lora_serve.lab.base_model.probes import ProbeFile
    from s3lora_serve.lab.calibration.calibrate import Calibration
    from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
    from s3lora_serve.lab.calibration.search import Point
    from s3lora_serve.plans.schema import Rate


READABLE = 0o644
"""Mode of what is written: others may read a plan, and never write it."""


class By(StrEnum):
    """What the gates remove."""

    DIRECTIONS = "directions"
    SUBSPACE = "subspace"
    COMPONENT = "component"
    MODULE = "module"


BaseArgument = Annotated[Path, typer.Argument(help="The base model's folder.")]
AdapterArgument = Annotated[Path, typer.Argument(help="The adapter's folder.")]
HarmfulOption = Annotated[Path, typer.Option(help="Prompts to refuse, JSON Lines with `prompt`.")]
BenignOption = Annotated[Path, typer.Option(help="Prompts not to refuse, likewise.")]
OutputOption = Annotated[
    list[Path],
    typer.Option(
        "--output",
        "-o",
        help="The plan to write, or a folder of plans; FILE.html: the frontier as a page.",
    ),
]
SkillOption = Annotated[
    Path | None,
    typer.Option(
        help="Requests whose answers to keep: `answer`, or else the adapter's own. None: --benign."
    ),
]
MaxASROption = Annotated[
    float,
    typer.Option(min=0, max=1, help="The attack success rate to reach, or the base model's own."),
]
ByOption = Annotated[By, typer.Option(help="What is removed.")]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Also measure whole modules at equal removed norm.")
]
StepsOption = Annotated[
    int, typer.Option(min=1, help="Steps of one round of the search, of three at most.")
]
SeedOption = Annotated[int, typer.Option(help="Of the split and the search.")]
RefusalOption = Annotated[
    list[str] | None,
    typer.Option(help="A refusal to restore; may be repeated. Else the base model's own."),
]
ComplianceOption = Annotated[
    list[str] | None,
    typer.Option(help="How an attack's answer begins; may be repeated. Else: no refusal."),
]
PhraseOption = Annotated[
    list[str] | None,
    typer.Option(help="Begins a refusal, in lower case; may be repeated, replaces the list."),
]
AcceptBestOption = Annotated[
    bool, typer.Option("--accept-best", help="Write the best plan if none reaches --max-asr.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted search of this plan.")
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the base model's weights.")]


def calibrate(
    base: BaseArgument,
    adapter: AdapterArgument,
    harmful: HarmfulOption,
    benign: BenignOption,
    output: OutputOption,
    skill: SkillOption = None,
    max_asr: MaxASROption = MAX_ASR,
    by: ByOption = By.DIRECTIONS,
    steps: StepsOption = STEPS,
    compare: CompareOption = False,
    seed: SeedOption = 0,
    refusal: RefusalOption = None,
    compliance: ComplianceOption = None,
    refusal_phrase: PhraseOption = None,
    accept_best: AcceptBestOption = False,
    resume: ResumeOption = False,
    form: FormatOption = Format.TABLE,
    device: ModelDeviceOption = Device.AUTO,
    dtype: DtypeOption = Dtype.BFLOAT16,
) -> None:
    """Learn, on your own probes, what to remove so that an adapter refuses again; write a plan.

    Exit code: 0 written, 1 the base model is unaligned or no setting reaches --max-asr, 2 wrong
    usage.
    """
    check_device(device)
    plan, page = _outputs(output)
    if find_spec("transformers") is None:
        stop("calibrate needs transformers: install s3lora-serve with its extra [calibrate]")
    asked: dict[str, Any] = {"max_asr": max_asr, "by": by.value, "steps": steps, "seed": seed}
    asked |= {
        "compare": compare,
        "refusals": tuple(refusal or ()),
        "compliance": tuple(compliance or ()),
    }
    where = {"device": torch_device(device), "dtype": dtype.value}
    with refusals_stop():
        files = read_probe_files(harmful, benign, skill)
        options = _options(asked, refusal_phrase)
        saved = _saved(plan), resume
        found = _calibrated(base, adapter, files, options, saved, **where)
        _print(found, form)
        if page:
            _write_page(page, found)
        if found.reached or accept_best:
            written = _plan_file(plan, found.plan.adapter_digest)
            write_whole(written, json.dumps(found.plan.as_json(), indent=1) + "\n", READABLE)
            typer.echo(f"{written}: {found.plan.digest}", err=True)
    if not found.reached:
        typer.echo(f"s3lora: {_missed(found, max_asr)}", err=True)
        raise typer.Exit(0 if accept_best else REJECTED)


def _outputs(output: list[Path]) -> tuple[Path, Path | None]:
    """The plan to write, and the page."""
    plans = [path for path in output if path.suffix != ".html"]
    pages = [path for path in output if path.suffix == ".html"]
    if len(plans) != 1 or len(pages) > 1:
        stop("--output takes one plan, and one .html page at most")
    return plans[0], pages[0] if pages else None


def read_probe_files(harmful: Path, benign: Path, skill: Path | None) -> "list[ProbeFile]":
    """The probes that a calibration is given.

    Raises:
        ProbesInvalid, OSError: a file cannot be used.
    """
    from s3lora_serve.lab.base_model.probes import read_probes

    files = [read_probes(harmful, "harmful"), read_probes(benign, "benign")]
    return files if skill is None else [*files, read_probes(skill, "skill")]


def _options(asked: dict[str, Any], phrases: list[str] | None) -> "CalibrationOptions":
    from s3lora_serve.lab.base_model.judge import REFUSAL_PHRASES
    from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions

    chosen = tuple(phrase.lower() for phrase in phrases or REFUSAL_PHRASES)
    return CalibrationOptions(**asked, phrases=chosen)


def _calibrated(
    base: Path,
    adapter: Path,
    files: "list[ProbeFile]",
    options: "CalibrationOptions",
    saved: tuple[Path, bool],
    **where: str,
) -> "Calibration":
    from s3lora_serve.lab.calibration.calibrate import calibrate as run
    from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
    from s3lora_serve.lab.calibration.saved_search import SearchFile

    base.stat()
    adapter.stat()
    with phase_bars() as progress:
        model, file = CalibrationBase(base, **where), SearchFile(*saved)
        return run(model, adapter, files, options, saved=file, progress=progress)


def _write_page(page: Path, found: "Calibration") -> None:
    from s3lora_serve.lab.pages.frontier import frontier_page

    write_whole(page, frontier_page(found.plan, found.frontier, found.by_module), READABLE)


def _missed(found: "Calibration", max_asr: float) -> TargetMissed:
    best = min(point.measured.asr.value for point in found.frontier)
    return TargetMissed(f"--max-asr {max_asr:g}: the best on the calibration split is {best:.2f}")


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
