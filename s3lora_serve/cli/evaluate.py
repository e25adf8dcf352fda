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

from s3lora_serve.cli.options import REJECTED, stop, stop_at, write_whole
from s3lora_serve.cli.strip import Action
from s3lora_serve.cli.tables import plain
from s3lora_serve.errors import S3LoRAError
from s3lora_serve.policy.canonical import canonical_digest

if TYPE_CHECKING:
    from s3lora_serve.lab.evaluation.results import Sweep, TrialResult
    from s3lora_serve.lab.evaluation.trials import Trial
    from s3lora_serve.plans.schema import Rate


def evaluate(
    url: Annotated[str, typer.Argument(help="A guarded server: http://HOST:PORT.")],
    adapter: Annotated[str, typer.Option(help="The adapter's folder, as the server sees it.")],
    task: Annotated[
        list[str],
        typer.Option(help="FILE.jsonl@refusal, FILE.jsonl@exact_match, or a task of inspect_ai."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    tau: Annotated[str, typer.Option(help="Numbers of modules to strip, to compare.")] = (
        "0,5,10,15,20"
    ),
    scorer: Annotated[
        str | None, typer.Option(help="mas-svd, safe-lora or splora; else the policy's.")
    ] = None,
    action: Annotated[Action | None, typer.Option(help="strip or project.")] = None,
    strength: Annotated[
        str, typer.Option(help="λ of the policy's repair, to compare: 0.3,0.1,0.03.")
    ] = "",
    plan: Annotated[Path | None, typer.Option(help="A plan to compare as well.")] = None,
    judge: Annotated[
        str, typer.Option(help="Of refusals: phrases, log-odds, or URL#MODEL.")
    ] = "phrases",
    max_asr: Annotated[float, typer.Option(min=0, max=1, help="The most ASR to accept.")] = 0.05,
    max_utility_loss: Annotated[
        float, typer.Option(min=0, max=1, help="The most utility to lose.")
    ] = 0.1,
    connections: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write a page with a plot there.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the settings that --output lacks.")
    ] = False,
    key: Annotated[
        str | None, typer.Option("--api-key", help="The server's key.", envvar="VLLM_API_KEY")
    ] = None,
) -> None:
    """Measure an adapter under several settings on a running server, and recommend one.

    For each setting the adapter is registered as an experiment, evaluated, and unloaded again.

    Exit code: 0 a setting keeps --max-asr and --max-utility-loss, 1 none does, 2 wrong usage, or
    server or task failed; what was measured until then is in the file.
    """
    if find_spec("inspect_ai") is None:
        stop("evaluate needs inspect-ai: install s3lora-serve with its extra [evaluate]")
    from s3lora_serve.lab.evaluation.results import Rule, Sweep, recommended
    from s3lora_serve.lab.evaluation.server import GuardedServer
    from s3lora_serve.lab.evaluation.sweep import check_tasks, run
    from s3lora_serve.lab.evaluation.task_files import task_file
    from s3lora_serve.lab.evaluation.trials import trials

    try:
        chosen_plan = _plan(plan)
        strengths = _strengths(strength)
        settings = trials(_counts(tau), scorer, action and action.value, chosen_plan, strengths)
        tasks = [task_file(text, judge) for text in task]
        check_tasks(tasks)
        rule = Rule(max_asr=max_asr, max_utility_loss=max_utility_loss)
        # A file of an earlier release has no strengths.
        asked = [url, adapter, task, judge, scorer, action, chosen_plan, *strengths]
        sweep = Sweep(key=canonical_digest(asked), url=url, adapter=adapter, rule=rule)
        if resume:
            sweep = sweep.model_copy(update={"trials": _kept(output, sweep.key)})
        done = {trial.label for trial in sweep.trials}
        todo = [setting for setting in settings if setting.label not in done]
        server = GuardedServer(url, key)
        logs = output.with_suffix(".logs")
        for result in _shown(
            lambda told: run(
                server, adapter, todo, tasks, logs, connections=connections, progress=told
            ),
            todo,
        ):
            sweep = sweep.model_copy(update={"trials": (*sweep.trials, result)})
            write_whole(output, sweep.model_dump_json(indent=1) + "\n")
        best = recommended(sweep.trials, rule)
        label = best.label if best else None
        sweep = sweep.model_copy(update={"recommended": label, "complete": True})
        write_whole(output, sweep.model_dump_json(indent=1) + "\n")
        if html is not None:
            from s3lora_serve.lab.pages.evaluation import sweep_page

            html.write_text(sweep_page(sweep))
    except KeyboardInterrupt:
        typer.echo(f"s3lora: interrupted; --resume goes on with {output}", err=True)
        raise typer.Exit(130) from None
    except ValueError as error:
        stop(str(error))
    except OSError as error:
        stop_at(error)
    except S3LoRAError as error:
        stop(str(error))
    _print(sweep, best)
    if best is None:
        raise typer.Exit(REJECTED)


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
