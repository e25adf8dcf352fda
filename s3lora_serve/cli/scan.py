"""`s3lora scan`: verdicts on adapters, one or a hundred thousand."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from s3lora_serve.adapter.discovery import find_adapters
from s3lora_serve.admission.policy_files import check_named_statistics
from s3lora_serve.admission.verdict import Decision, Verdict
from s3lora_serve.cli.options import (
    REJECTED,
    Device,
    DeviceOption,
    PolicyOption,
    ReferenceOption,
    ScorerName,
    StatisticsOption,
    check_device,
    stop,
    stop_at,
)
from s3lora_serve.cli.scan_output import ScanFormat, output_in
from s3lora_serve.errors import S3LoRAError, StorageFailed
from s3lora_serve.policy.file import effective_policy, with_options
from s3lora_serve.policy.schema import Policy

if TYPE_CHECKING:
    from s3lora_serve.lab.sweeps.sweep import Folder

MANY = 32
"""Number of adapters from which several processes save time; their start takes seconds."""


PathsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Adapter folders, folders of adapters, patterns, URLs that fsspec opens;"
        " - for a list on standard input."
    ),
]
FormatOption = Annotated[ScanFormat, typer.Option("--format", help="How to print.")]
ScorerOption = Annotated[
    ScorerName | None, typer.Option(help="Another index than the policy's, to compare.")
]
JobsOption = Annotated[
    int, typer.Option(min=0, help="Processes; 0: one a core where there are many adapters.")
]
RayOption = Annotated[
    str | None, typer.Option(help="Score on a Ray cluster: auto, or its address.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write there, not to standard output.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the jsonl file of --output.")
]


def scan(
    paths: PathsArgument,
    form: FormatOption = ScanFormat.TABLE,
    policy: PolicyOption = None,
    scorer: ScorerOption = None,
    reference: ReferenceOption = None,
    repair: StatisticsOption = None,
    device: DeviceOption = Device.AUTO,
    jobs: JobsOption = 0,
    ray: RayOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
) -> None:
    """Say what the gate would do with each adapter; nothing is written.

    Exit code: 0 admitted or stripped, 1 at least one rejected, 2 wrong usage.
    """
    check_device(device)
    _check_output(form, output, resume)
    if ray is not None and jobs:
        stop("--ray scores on all CPUs of the cluster: leave --jobs out")
    chosen = _policy(policy, scorer, reference, repair)
    folders = _found(paths)
    known = _known(output, chosen) if resume and output else {}
    todo = [folder for folder in folders if str(folder) not in known]
    how = chosen, device.value
    verdicts = _here(todo, *how, jobs) if ray is None else _on_cluster(todo, *how, ray)
    rejected = any(decision == Decision.REJECTED for decision in known.values())
    with ExitStack() as stack:
        written = output_in(form, _opened(stack, output, resume))
        for verdict in _shown(verdicts, len(todo)):
            written.add(verdict)
            rejected |= verdict.decision is Decision.REJECTED
        written.end()
    raise typer.Exit(REJECTED if rejected else 0)


def _check_output(form: ScanFormat, output: Path | None, resume: bool) -> None:
    if output is not None and form is ScanFormat.TABLE:
        stop("--output takes --format json, jsonl or sarif")
    if resume and (output is None or form is not ScanFormat.JSONL):
        stop("--resume takes --format jsonl and --output FILE")


def _found(paths: Iterable[str]) -> "list[Folder]":
    try:
        return list(find_adapters(_listed(paths)))
    except OSError as error:
        stop_at(error)
    except StorageFailed as error:
        stop(str(error))


def _policy(
    file: Path | None, scorer: ScorerName | None, reference: Path | None, repair: Path | None
) -> Policy:
    try:
        chosen = effective_policy(file=file)
        chosen = with_options(chosen, scorer, reference, statistics=repair)
        check_named_statistics(chosen)
    except S3LoRAError as error:
        stop(str(error))
    return chosen


def _here(folders: "list[Folder]", policy: Policy, device: str, jobs: int) -> Iterator[Verdict]:
    from s3lora_serve.lab.sweeps.sweep import default_jobs, sweep

    workers = jobs or (default_jobs() if len(folders) >= MANY else 1)
    return sweep(folders, policy, device, workers)


def _on_cluster(
    folders: "Iterable[Folder]", policy: Policy, device: str, address: str
) -> Iterator[Verdict]:
    try:
        from s3lora_serve.lab.sweeps.ray_sweep import ray_sweep  # an extra
    except ImportError:
        stop("--ray needs ray: install s3lora-serve with its extra [ray]")
    try:
        yield from ray_sweep(folders, policy, device, address)
    except ConnectionError as error:
        stop(f"--ray {address}: {str(error).splitlines()[0]}")


def _listed(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        if path == "-":
            yield from (line for line in sys.stdin.read().splitlines() if line)
        else:
            yield path


def _known(file: Path, policy: Policy) -> dict[str, str]:
    """Decisions by path of an earlier run under this policy; cuts off an incomplete last line."""
    known: dict[str, str] = {}
    if not file.exists():
        return known
    with file.open("r+b") as lines:
        whole = 0
        for line in lines:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                verdict = json.loads(line)
                path, decision = verdict["path"], verdict["decision"]
                decided = verdict["policy_digest"], verdict["scorer"]["name"]
            except (ValueError, KeyError, TypeError):
                stop(f"{file} is no file of scan --format jsonl: {line[:80]!r}")
            if decided != (policy.digest, policy.scorer.name):
                stop(f"{file} was written under another policy: begin a new file")
            known[path] = decision
        lines.truncate(whole)
    return known


def _opened(stack: ExitStack, output: Path | None, resume: bool) -> TextIO:
    if output is None:
        return sys.stdout
    try:
        return stack.enter_context(output.open("a" if resume else "x"))
    except FileExistsError:
        stop(f"{output} exists; --resume goes on with a jsonl file")
    except OSError as error:
        stop(f"{output}: {error.strerror}")


def _shown(verdicts: Iterator[Verdict], total: int) -> Iterator[Verdict]:
    """The same verdicts, with a progress bar if standard error is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn()
    watched = sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=not watched) as bar:
        task = bar.add_task("adapters", total=total)
        for verdict in verdicts:
            yield verdict
            bar.advance(task)


class RateColumn(ProgressColumn):
    """Adapters a second."""

    def render(self, task: Task) -> Text:
        """The rate, as rich shows it for tasks without a total."""
        return TaskProgressColumn.render_speed(task.finished_speed or task.speed)
