"""`s3lora summary`: summarises the verdicts of a scan over a whole registry."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s3lora_serve.cli.options import stop, stop_at

if TYPE_CHECKING:
    from s3lora_serve.lab.sweeps.registry_summary import RegistrySummary


def write_summary(
    verdicts: Annotated[Path, typer.Argument(help="What scan --format jsonl -o FILE wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="An HTML page to write.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="A Parquet table to write, one row for each adapter.")
    ] = None,
) -> None:
    """Write what a sweep found: distribution of the index, outliers, tenants.

    Exit code: 0, or 2 for wrong usage.
    """
    from s3lora_serve.lab.pages.registry import registry_page
    from s3lora_serve.lab.sweeps.registry_summary import summarize

    if output is None and parquet is None:
        stop("name an HTML page (--output), a table (--parquet), or both")
    try:
        with verdicts.open() as lines:
            registry = summarize(lines)
        if output is not None:
            output.write_text(registry_page(registry))
        if parquet is not None:
            _write_parquet(registry, parquet)
    except ValueError as error:
        stop(f"{verdicts}: {error}")
    except OSError as error:
        stop_at(error)
    counts = ", ".join(f"{count} {word}" for word, count in registry.decisions().items())
    typer.echo(f"{len(registry.rows)} adapters: {counts}")


def _write_parquet(registry: "RegistrySummary", file: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        stop("--parquet needs pyarrow: install s3lora-serve with its extra [parquet]")
    from s3lora_serve.lab.sweeps.registry_summary import as_columns

    pyarrow.parquet.write_table(pyarrow.table(as_columns(registry.rows)), file)
