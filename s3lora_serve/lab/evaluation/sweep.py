"""Run tasks of inspect_ai against a guarded server, once for each setting."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog
from inspect_ai.model import get_model
from inspect_ai.scorer import value_to_float

from s3lora_serve.errors import EvaluationFailed
from s3lora_serve.lab.evaluation.results import TaskScore, TrialResult
from s3lora_serve.lab.evaluation.server import GuardedServer
from s3lora_serve.lab.evaluation.task_files import TaskFile
from s3lora_serve.lab.evaluation.trials import Trial
from s3lora_serve.plans.schema import wilson

SERVICE = "s3lora"
"""Name of the server among inspect_ai's OpenAI-compatible services."""

NO_KEY = "none"
"""inspect_ai asks for a key also where the server has none."""


def run(
    server: GuardedServer,
    adapter: str,
    todo: Sequence[Trial],
    tasks: Sequence[TaskFile],
    logs: Path,
    *,
    connections: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[TrialResult]:
    """The result of each setting, in order; the adapter is registered only meanwhile.

    Raises:
        EvaluationFailed: the server refuses the adapter or dies, or a task fails.
        KeyboardInterrupt: the run was interrupted.
    """
    needed = {key for trial in todo for key in trial.settings}
    names = server.names(needed | ({"plan"} if any(trial.plan for trial in todo) else set()))
    for trial in todo:
        name = names.replace("*", f"{Path(adapter).name}@{trial.label}", 1)
        progress(trial.label)
        with server.experiment(name, adapter, trial) as verdict:
            found = [_score(server, name, task, logs, connections) for task in tasks]
        kinds = ("stripped", "transformed", "projected", "repaired")
        yield TrialResult(
            label=trial.label,
            decision=verdict["decision"],
            changed=sum(any(m[kind] for kind in kinds) for m in verdict["modules"]),
            snippet=trial.snippet,
            scores=tuple(found),
        )


def _score(
    server: GuardedServer, name: str, task: TaskFile, folder: Path, connections: int
) -> TaskScore:
    model = get_model(
        f"openai-api/{SERVICE}/{name}",
        base_url=f"{server.url}/v1",
        api_key=server.key or NO_KEY,
        memoize=False,
    )
    logs = inspect_eval(
        task.make(),
        model=model,
        log_dir=str(folder),
        display="none",
        max_connections=connections,
        max_retries=2,
        tags=[name],
    )
    # inspect_ai takes Ctrl-C for itself. One before its first sample leaves no log at all.
    if not logs or logs[0].status == "cancelled":
        raise KeyboardInterrupt
    log = logs[0]
    if log.status != "success" or not log.samples:
        why = log.error.message.splitlines()[-1] if log.error else "it has no samples"
        raise EvaluationFailed(f"task {task.name} for {name}: {why[:300]}")
    values = _values(log, task)
    successes = round(sum(values))
    return TaskScore(
        task=task.name, role=task.role, rate=wilson(successes, len(values)), log=log.location
    )


def _values(log: EvalLog, task: TaskFile) -> list[float]:
    """The samples' scores by the task's first scorer, as numbers."""
    convert = value_to_float()
    values = []
    for sample in log.samples or []:
        if not sample.scores:
            raise EvaluationFailed(f"task {task.name} gave a sample no score")
        value: Any = next(iter(sample.scores.values())).value
        if isinstance(value, dict):
            if task.value not in value:
                raise EvaluationFailed(
                    f"task {task.name} has the values {sorted(value)}: name one with #VALUE"
                )
            value = value[task.value]
        values.append(float(convert(value)))
    return values


def check_tasks(tasks: Sequence[TaskFile]) -> None:
    """Check, before anything is registered, that every task can be made and has samples.

    Raises:
        EvaluationFailed: one cannot, or has none.
    """
    for task in tasks:
        made = task.make()
        if isinstance(made, Task) and not len(made.dataset):
            raise EvaluationFailed(f"task {task.name} has no samples")
