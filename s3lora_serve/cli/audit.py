"""`s3lora audit`: verifies audit logs."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from s3lora_serve.telemetry.audit_chain import Chain, walk
from s3lora_serve.telemetry.audit_files import readable

audit_app = typer.Typer(no_args_is_help=True, help="Work on audit logs.")

BROKEN, USAGE = 1, 2

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


@audit_app.callback()
def _group() -> None:
    """Keep the name `verify`: Typer drops the name of a single command."""


def _digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise typer.BadParameter(f"expected sha256: and 64 hexadecimal digits, got {value[:80]!r}")
    return value


def _digest_or_time(value: str) -> str:
    """A digest as it is, a time in ISO 8601 with its zone."""
    if value.startswith("sha256:"):
        return _digest(value)
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        problem = "expected the digest of a line, or a time such as 2026-03-02T08:11Z"
        raise typer.BadParameter(f"{problem}, got {value[:80]!r}") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()


@audit_app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Audit log; its rotated files are read with it.")],
    expect: Annotated[
        str | None,
        typer.Option(help="Digest of a line, noted earlier: it must be there.", parser=_digest),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST|TIME",
            help="Fail unless the kept lines reach back to this line or time (UTC).",
            parser=_digest_or_time,
        ),
    ] = None,
) -> None:
    """Follow the chain of digests through a log and its rotated files.

    The first word says what was found. whole: from the first line ever written. incomplete: the
    kept lines follow each other, and earlier ones were rotated away. broken: lines were edited,
    removed or moved. empty: there is no line.

    Exit code: 0 whole, incomplete or empty, 1 broken, without the line expected, or not reaching
    back to --since, 2 missing or unreadable.
    """
    try:
        with readable(path) as files:
            chain = walk(files, [digest for digest in (expect, since) if digest])
    except OSError as error:
        typer.echo(f"s3lora: {error.filename or path}: {error.strerror}", err=True)
        raise typer.Exit(USAGE) from None
    lacking = list(_lacking(chain, expect, since))
    for line in (*_report(path, chain), *lacking):
        typer.echo(line)
    raise typer.Exit(BROKEN if chain.broken or lacking else 0)


def _lacking(chain: Chain, expect: str | None, since: str | None) -> Iterator[str]:
    """What was asked for and is not in the log."""
    if expect and expect not in chain.found:
        yield f"expected: no kept line has {expect}: cut off, changed, or rotated out since"
    if since and not _reaches(chain, since):
        first = f"of {chain.first}" if chain.first else "without a time"
        kept = f"the first kept line is {first}" if chain.lines else "no line is kept"
        yield f"since {since}: {kept}: earlier ones were rotated out or removed, or never written"


def _reaches(chain: Chain, since: str) -> bool:
    if since.startswith("sha256:"):
        return since in chain.found
    if chain.first is None:
        return False
    return datetime.fromisoformat(chain.first) <= datetime.fromisoformat(since)


def _report(path: Path, chain: Chain) -> Iterator[str]:
    span = f", {chain.first} to {chain.last}" if chain.first else ""
    yield f"{_state(chain)}: {path}, lines: {chain.lines}, files: {chain.files}{span}"
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


def _state(chain: Chain) -> str:
    if chain.broken:
        return "broken"
    if not chain.lines:
        return "empty"
    return "whole" if chain.from_start else "incomplete"
