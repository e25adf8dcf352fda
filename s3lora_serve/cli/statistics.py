"""`s3lora statistics`: makes the statistics that repair needs of a base model, and shows them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from s3lora_serve.cli.options import (
    Device,
    Dtype,
    Format,
    ModelDeviceOption,
    check_device,
    refusals_stop,
    stop,
    torch_device,
)
from s3lora_serve.cli.progress import phase_bars
from s3lora_serve.cli.tables import plain
from s3lora_serve.errors import S3LoRAError

if TYPE_CHECKING:
    from s3lora_serve.lab.statistics.make_statistics import Benign
    from s3lora_serve.repair.statistics_file import StatisticsFile

WEAK = 0.8
"""Captured share of the harmful inputs' energy under which a site is named. Ours."""

statistics_app = typer.Typer(
    no_args_is_help=True, help="Work on statistics of a base model's inputs, for repair."
)


BaseArgument = Annotated[Path, typer.Argument(help="The served, aligned base model: a folder.")]
HarmfulOption = Annotated[Path, typer.Option(help="Prompts that it refuses, as JSON Lines.")]
BenignOption = Annotated[
    list[str],
    typer.Option(
        help="Prompts that it answers, as JSON Lines; FILE or FILE=WEIGHT, repeatable. Requests of"
        " the kinds that tenants send matter most."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
RankOption = Annotated[int, typer.Option(min=1, help="Directions of each input.")]
OutputRankOption = Annotated[int, typer.Option(min=1, help="Directions of each output.")]
EpsilonOption = Annotated[
    float, typer.Option(min=1e-6, help="Weight of inputs that no benign prompt has.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="How directions are stored.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the layers of an interrupted run.")
]


@statistics_app.command("make")
def make(
    base: BaseArgument,
    harmful: HarmfulOption,
    benign: BenignOption,
    output: OutputOption,
    rank: RankOption = 64,
    output_rank: OutputRankOption = 64,
    epsilon: EpsilonOption = 0.1,
    dtype: DtypeOption = Dtype.BFLOAT16,
    device: ModelDeviceOption = Device.AUTO,
    resume: ResumeOption = False,
) -> None:
    """Measure what harmful and benign prompts produce inside a base model, once for all adapters.

    One layer at a time is run on all prompts, and gradients of refusals go back through it. The
    file appears complete or not at all.

    Exit code: 0 written, 1 the base model does not refuse the harmful prompts, 2 wrong usage.
    """
    check_device(device)
    try:
        from s3lora_serve.lab.base_model.probes import read_probes
        from s3lora_serve.lab.statistics.make_statistics import (  # an extra
            StatisticsProbes,
            make_statistics,
        )
    except ImportError:
        stop("statistics make needs transformers: install s3lora-serve with its extra [calibrate]")
    with refusals_stop(), _memory_stops(), phase_bars() as progress:
        about = make_statistics(
            base,
            StatisticsProbes(read_probes(harmful, "harmful"), [_benign(each) for each in benign]),
            output,
            _choice(rank, output_rank, epsilon, dtype),
            device=torch_device(device),
            resume=resume,
            progress=progress,
        )
    typer.echo(f"{output}: {len(about.sites)} input sites, rank {about.rank}")


@contextmanager
def _memory_stops() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        stop(f"there is not enough memory: {str(error)[:300]}")


@statistics_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A file of statistics.")],
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
) -> None:
    """Print what statistics were made of, and how much of each input's energy they hold.

    Exit code: 0, or 2 if the file holds no valid statistics.
    """
    from s3lora_serve.repair.statistics_file import read_statistics  # imports torch

    try:
        found = read_statistics(file)
    except S3LoRAError as error:
        stop(str(error))
    if form is Format.JSON:
        typer.echo(json.dumps({"digest": found.digest, **_as_json(found)}))
        return
    _print(found)


def _choice(rank: int, output_rank: int, epsilon: float, dtype: Dtype) -> Any:
    import torch

    from s3lora_serve.lab.statistics.input_statistics import Choice

    return Choice(rank, output_rank, epsilon, getattr(torch, dtype.value))


def _benign(text: str) -> "Benign":
    """A file with its weight, from FILE or FILE=WEIGHT."""
    from s3lora_serve.lab.base_model.probes import read_probes
    from s3lora_serve.lab.statistics.make_statistics import Benign

    name, separator, weight = text.rpartition("=")
    if not separator or Path(text).exists():
        return Benign(read_probes(Path(text), "benign"))
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        stop(f"--benign {text}: the weight is {weight!r}, expected a number above 0")
    return Benign(read_probes(Path(name), "benign"), value)


def _as_json(found: "StatisticsFile") -> dict[str, Any]:
    about = found.about.model_dump(mode="json")
    for name, site in about["sites"].items():
        statistics = found.sites[name]
        site["width"] = statistics.width
        site["largest"] = float(statistics.mu[0])
        site["smallest"] = float(statistics.mu[-1])
    return about


def _print(found: "StatisticsFile") -> None:
    about, console = found.about, Console()
    console.print(plain(f"digest   {found.digest}"))
    console.print(plain(f"base     {about.base_digest}"))
    for probes in about.probes:
        weight = f", weight {probes.weight:g}" if probes.kind == "benign" else ""
        told = f"{probes.count} prompts, {probes.tokens} tokens{weight}"
        console.print(plain(f"{probes.kind:8} {probes.digest[:19]}…: {told}"))
    heads = ("input of", "width", "μ₁", "μ_k", "harmful held", "benign held", "gradients held")
    table = Table(*heads)
    sites = sorted(about.sites.items(), key=lambda item: item[1].harmful_captured)
    for name, site in sites:
        statistics = found.sites[name]
        others = f" (+{len(site.outputs) - 1})" if len(site.outputs) > 1 else ""
        table.add_row(
            plain(f"{name}{others}"),
            str(statistics.width),
            f"{float(statistics.mu[0]):.3g}",
            f"{float(statistics.mu[-1]):.3g}",
            f"{site.harmful_captured:.1%}",
            f"{site.benign_captured:.1%}",
            f"{min(output.captured for output in site.outputs.values()):.1%}",
        )
    console.print(table)
    weak = sum(site.harmful_captured < WEAK for site in about.sites.values())
    console.print(
        f"{len(sites)} input sites, rank {about.rank}, ε {about.epsilon:g};"
        f" {weak} with less than {WEAK:.0%} of their harmful energy held"
    )
