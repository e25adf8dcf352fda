"""`s3lora evaluate`: compares settings of the gate on a running server, with inspect_ai."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from s3lora_serve.cli.options import REJECTED, refusals_stop, stop, write_whole
from s3lora_serve.cli.strip import Action
from s3lora_serve.cli.tables import plain
from s3lora_serve.plans.defaults import MAX_ASR
from s3lora_serve.policy.canonical import canonical_digest

if TYPE_CHECKING:
    from s3lora_serve.lab.evaluation.results import Sweep, TrialResult
    from s3lora_serve.lab.evaluation.task_files import TaskFile
    from s3lora_serve.lab.evaluation.trials import Trial
    from s3lora_serve.plans.schema import Rate


URLArgument = Annotated[str, typer.Argument(help="A guarded server: http://HOST:PORT.")]
AdapterOption = Annotated[str, typer.Option(help="The adapter's folder, as the server sees it.")]
TaskOption = Annotated[
    list[str],
    typer.Option(help="FILE.jsonl@refusal, FILE.jsonl@exact_match, or a task of inspect_ai."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")]
TauOption = Annotated[str, typer.Option(help="Numbers of modules to strip, to compare.")]
ScorerOption = Annotated[
    str | None, typer.Option(help="mas-svd, safe-lora or splora; else the policy's.")
]
ActionOption = Annotated[Action | None, typer.Option(help="strip or project.")]
StrengthOption = Annotated[
    str, typer.Option(help="λ of the policy's repair, to compare: 0.3,0.1,0.03.")
]
PlanOption = Annotated[Path | None, typer.Option(help="A plan to compare as well.")]
JudgeOption = Annotated[str, typer.Option(help="Of refusals: phrases, log-odds, or URL#MODEL.")]
MaxASROption = Annotated[float, typer.Option(min=0, max=1, help="The most ASR to accept.")]
MaxLossOption = Annotated[float, typer.Option(min=0, max=1, help="The most utility to lose.")]
ConnectionsOption = Annotated[int, typer.Option(min=1, help="Requests at the same time.")]
HTMLOption = Annotated[Path | None, typer.Option(help="Write a page with a plot there.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the settings that --output lacks.")
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key", help="The server's key.", envvar="VLLM_API_KEY")
]


def evaluate(
    url: URLArgument,
    adapter: AdapterOption,
    task: TaskOption,
    output: OutputOption,
    tau: TauOption = "0,5,10,15,20",
    scorer: ScorerOption = None,
    action: ActionOption = None,
    strength: StrengthOption = "",
    plan: PlanOption = None,
    judge: JudgeOption = "phrases",
    max_asr: MaxASROption = MAX_ASR,
    max_utility_loss: MaxLossOption = 0.1,
    connections: ConnectionsOption = 8,
    html: HTMLOption = None,
    resume: ResumeOption = False,
    key: KeyOption = None,
) -> None:
    """Measure an adapter under several settings on a running server, and recommend one.

    For each setting the adapter is registered as an experiment, evaluated, and unloaded again.

    Exit code: 0 a setting keeps --max-asr and --max-utility-loss, 1 none does, 2 wrong usage, or
    server or task failed; what was measured until then is in the file.
    """
    if find_spec("inspect_ai") is None:
        stop("evaluate needs inspect-ai: install s3lora-serve with its extra [evaluate]")
    try:
        with refusals_stop():
            settings, tasks, what = _asked(tau, scorer, action, strength, plan, task, judge)
            bounds = max_asr, max_utility_loss
            sweep = _sweep(url, adapter, what, bounds, output if resume else None)
            sweep = _measured(sweep, settings, tasks, output, key, connections)
            if html is not None:
                _write_page(html, sweep)
    except KeyboardInterrupt:
        typer.echo(f"s3lora: interrupted; --resume goes on with {output}", err=True)
        raise typer.Exit(130) from None
    except ValueError as error:
        stop(str(error))
    best = next((trial for trial in sweep.trials if trial.label == sweep.recommended), None)
    _print(sweep, best)
    if best is None:
        raise typer.Exit(REJECTED)


def _asked(
    tau: str,
    scorer: str | None,
    action: Action | None,
    strength: str,
    plan: Path | None,
    task: list[str],
    judge: str,
) -> "tuple[list[Trial], list[TaskFile], list[Any]]":
    """The settings and tasks that are asked for, and what tells them from others."""
    from s3lora_serve.lab.evaluation.sweep import check_tasks
    from s3lora_serve.lab.evaluation.task_files import task_file
    from s3lora_serve.lab.evaluation.trials import trials

    chosen_plan, strengths = _plan(plan), _strengths(strength)
    settings = trials(_counts(tau), scorer, action and action.value, chosen_plan, strengths)
    tasks = [task_file(text, judge) for text in task]
    check_tasks(tasks)
    # A file of an earlier release has no strengths.
    return settings, tasks, [task, judge, scorer, action, chosen_plan, *strengths]


def _sweep(
    url: str, adapter: str, what: list[Any], bounds: tuple[float, float], kept: Path | None
) -> "Sweep":
    """An empty sweep, or what an interrupted one has in its file."""
    from s3lora_serve.lab.evaluation.results import Bounds, Sweep

    rule = Bounds(max_asr=bounds[0], max_utility_loss=bounds[1])
    key = canonical_digest([url, adapter, *what])
    sweep = Sweep(key=key, url=url, adapter=adapter, rule=rule)
    return sweep if kept is None else sweep.model_copy(update={"trials": _kept(kept, key)})


def _measured(
    sweep: "Sweep",
    settings: "list[Trial]",
    tasks: "list[TaskFile]",
    output: Path,
    key: str | None,
    connections: int,
) -> "Sweep":
    """The sweep with the settings that it lacks, written after each of them."""
    from s3lora_serve.lab.evaluation.results import recommended
    from s3lora_serve.lab.evaluation.server import GuardedServer
    from s3lora_serve.lab.evaluation.sweep import run

    done = {trial.label for trial in sweep.trials}
    todo = [setting for setting in settings if setting.label not in done]
    server, logs = GuardedServer(sweep.url, key), output.with_suffix(".logs")

    def measure(told: Any) -> Any:
        how = {"connections": connections, "progress": told}
        return run(server, sweep.adapter, todo, tasks, logs, **how)

    for result in _shown(measure, todo):
        sweep = sweep.model_copy(update={"trials": (*sweep.trials, result)})
        write_whole(output, sweep.model_dump_json(indent=1) + "\n")
    best = recommended(sweep.trials, sweep.rule)
    label = best.label if best else None
    sweep = sweep.model_copy(update={"recommended": label, "complete": True})
    write_whole(output, sweep.model_dump_json(indent=1) + "\n")
    return sweep


def _write_page(page: Path, sweep: "Sweep") -> None:
    from s3lora_serve.lab.pages.evaluation import sweep_page

    page.write_text(sweep_page(sweep))


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--tau takes numbers with commas between them, got {text!r}") from None


def _strengths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"--strength takes numbers with commas between them, got {text!r}"
        ) from None


def _plan(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    from s3lora_serve.plans.file import read_plan

    return read_plan(file).as_json()


def _kept(file: Path, key: str) -> "tuple[TrialResult, ...]":
    """The results of an interrupted sweep that asked for the same."""
    from s3lora_serve.lab.evaluation.results import Sweep

    if not file.exists():
        return ()
    try:
        before = Sweep.model_validate_json(file.read_bytes())
    except ValueError:
        raise ValueError(f"{file} is not a sweep; leave --resume out, or name another") from None
    if before.key != key:
        raise ValueError(f"{file} has other tasks, adapter or server: --resume cannot go on")
    return before.trials


def _shown(run: Any, todo: "Sequence[Trial]") -> Any:
    """The results, with a bar over the settings on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        bar = bars.add_task("settings", total=len(todo))
        for result in run(lambda label: bars.update(bar, description=label)):
            bars.advance(bar)
            yield result


def _print(sweep: "Sweep", best: "TrialResult | None") -> None:
    console = Console()
    names = [score.task for score in sweep.trials[0].scores] if sweep.trials else []
    roles = [score.role for score in sweep.trials[0].scores] if sweep.trials else []
    heads = [f"{role} {Path(name).name}" for name, role in zip(names, roles, strict=True)]
    table = Table("setting", "decision", "changed", *(Column(plain(head)) for head in heads))
    for trial in sweep.trials:
        mark = " *" if best is not None and trial.label == best.label else ""
        cells = [_rate(score.rate) for score in trial.scores]
        table.add_row(plain(trial.label + mark), trial.decision, str(trial.changed), *cells)
    console.print(table)
    bounds = f"ASR ≤ {sweep.rule.max_asr:g}, utility loss ≤ {sweep.rule.max_utility_loss:g}"
    if best is None:
        console.print(f"no setting keeps {bounds}: consider a plan (s3lora calibrate)")
        return
    console.print(plain(f"recommended, by {bounds}: {best.label}. In the policy:"))
    console.print(plain(yaml.safe_dump(best.snippet, default_flow_style=True).strip()))


def _rate(rate: "Rate") -> str:
    return f"{rate.value:.2f} ({rate.low:.2f}–{rate.high:.2f})"
