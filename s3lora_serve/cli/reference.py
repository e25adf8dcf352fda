"""`s3lora reference`: makes an alignment reference of two checkpoints, and shows one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from s3lora_serve.cli.options import Device, Dtype, Format, check_device, refusals_stop
from s3lora_serve.cli.progress import phase_bars
from s3lora_serve.cli.tables import plain

if TYPE_CHECKING:
    from s3lora_serve.alignment.reference_file import Reference

WEAK = 0.5
"""Captured share under which a module is named: most of what alignment changed is not seen."""

reference_app = typer.Typer(
    no_args_is_help=True, help="Work on alignment references, for safe-lora and splora."
)


@reference_app.command("make")
def make(
    base: Annotated[Path, typer.Option(help="The model before its alignment: a folder.")],
    aligned: Annotated[Path, typer.Option(help="The aligned model, which is served: a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Directions to keep of each module.")] = 128,
    modules: Annotated[
        list[str] | None, typer.Option(help="Glob for modules or projections; repeatable.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Full SVD in the place of a randomised one.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="How directions are stored.")] = Dtype.BFLOAT16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run made.")
    ] = False,
) -> None:
    """Keep of each module what alignment changed: the leading directions of W_aligned − W_base.

    One module at a time is in memory. The file appears complete or not at all.

    Exit code: 0 written, 2 wrong usage, or no reference can be made of these checkpoints.
    """
    from s3lora_serve.lab.make_reference import ReferenceOptions, make_reference  # imports torch

    check_device(device)
    where = "cpu" if device is Device.AUTO else device.value
    options = ReferenceOptions(rank, tuple(modules or ("*",)), exact, dtype.value, where)
    with refusals_stop(), phase_bars() as progress:
        about = make_reference(base, aligned, output, options, resume=resume, progress=progress)
    typer.echo(f"{output}: {len(about.modules)} modules, rank {about.rank}")


@reference_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="An alignment reference.")],
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
) -> None:
    """Print what a reference was made of, and how much of each module's change it captures.

    Exit code: 0, or 2 if the file is not a valid reference.
    """
    from s3lora_serve.alignment.reference_file import read_reference  # imports torch

    with refusals_stop():
        reference = read_reference(file)
    if form is Format.JSON:
        typer.echo(json.dumps(_as_json(reference)))
        return
    _print(reference)


def _as_json(reference: "Reference") -> dict[str, object]:
    about = reference.about.model_dump(mode="json")
    for name, module in about["modules"].items():
        subspace = reference.subspaces[name]
        module["captured"] = subspace.captured
        module["largest_singular_value"] = _largest(reference, name)
    return {"digest": reference.digest, **about}


def _largest(reference: "Reference", name: str) -> float:
    values = reference.subspaces[name].singular_values
    return float(values[0]) if len(values) else 0.0


def _print(reference: "Reference") -> None:
    about = reference.about
    console = Console()
    console.print(plain(f"digest   {reference.digest}"))
    console.print(plain(f"base     {about.base_digest}"))
    console.print(plain(f"aligned  {about.aligned_digest}"))
    table = Table("module", "shape", "‖V‖", "σ₁", "captured")
    captured = {name: space.captured for name, space in reference.subspaces.items()}
    for name, module in sorted(about.modules.items(), key=lambda item: captured[item[0]]):
        table.add_row(
            plain(name),
            f"{module.shape[0]} x {module.shape[1]}",
            f"{module.frobenius:.3g}",
            f"{_largest(reference, name):.3g}",
            f"{captured[name]:.1%}" if module.frobenius else "unchanged",
        )
    console.print(table)
    weak = sum(value < WEAK for value in captured.values())
    console.print(
        f"{len(captured)} modules, rank {about.rank};"
        f" {weak} with less than {WEAK:.0%} of their change captured"
    )
