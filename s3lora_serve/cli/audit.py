"""`s3lora audit`: verifies audit logs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from s3lora_serve.telemetry.audit_chain import Chain, walk
from s3lora_serve.telemetry.audit_files import readable

audit_app = typer.Typer(no_args_is_help=True, help="Work on audit logs.")

BROKEN, USAGE = 1, 2


@audit_app.callback()
def _group() -> None:
    """Keep the name `verify`: Typer drops the name of a single command."""


def _digest(value: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", value, re.ASCII):
        raise typer.BadParameter(f"expected sha256: and 64 hexadecimal digits, got {value[:80]!r}")
    return value


@audit_app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Audit log; its rotated files are read with it.")],
    expect: Annotated[
        str | None,
        typer.Option(help="Digest of a line, noted earlier: it must be there.", parser=_digest),
    ] = None,
) -> None:
    """Follow the chain of digests through a log and its rotated files.

    Exit code: 0 whole, 1 broken or without the line expected, 2 missing or unreadable.
    """
    try:
        with readable(path) as files:
            chain = walk(files, expect)
    except OSError as error:
        typer.echo(f"s3lora: {error.filename or path}: {error.strerror}", err=True)
        raise typer.Exit(USAGE) from None
    lacking = expect is not None and not chain.expected
    for line in _report(path, chain):
        typer.echo(line)
    if lacking:
        typer.echo(f"expected: no kept line has {expect}: cut off, changed, or rotated out since")
    raise typer.Exit(BROKEN if chain.broken or lacking else 0)


def _report(path: Path, chain: Chain) -> Iterator[str]:
    state = "broken" if chain.broken else "whole"
    span = f", {chain.first} to {chain.last}" if chain.first else ""
    yield f"{path}: {state}, lines: {chain.lines}, files: {chain.files}{span}"
    for finding in chain.breaks:
        yield f"{finding.place}: {finding.text}"
    if chain.broken > len(chain.breaks):
        yield f"… and {chain.broken - len(chain.breaks)} more"
    for note in chain.notes:
        yield f"note: {note.place}: {note.text}"
    if chain.begins:
        yield f"first line follows one no longer kept: {chain.begins}"
    if chain.ends:
        yield f"last line: {chain.ends}"
