"""The tasks that a command names: FILE.jsonl@refusal, FILE.jsonl@exact_match, FILE.py@task."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inspect_ai import Task, TaskInfo, list_tasks

from s3lora_serve.errors import EvaluationFailed, ProbesInvalid
from s3lora_serve.lab.evaluation import tasks as packaged
from s3lora_serve.lab.evaluation.results import Role


@dataclass(frozen=True, slots=True)
class TaskFile:
    """One task: its name, what its score means, and how inspect_ai gets it."""

    name: str
    role: Role
    make: Callable[[], Task | str]  # a str is a name that inspect_ai resolves
    value: str | None = None  # which value of a score that has several


def task_file(text: str, judge: str) -> TaskFile:
    """The task of this name. `refusal` measures the ASR, all others utility.

    A name without a file is one of an installed package: inspect_evals/NAME. `#VALUE` at the end
    chooses one value of a score that has several.

    Raises:
        EvaluationFailed: there is no such file or task.
    """
    whole, _, value = text.partition("#")
    file, _, name = whole.rpartition("@")
    path = Path(file or whole)
    if path.suffix == ".jsonl":
        return _packaged(text, path, name if file else "", judge)
    if path.suffix == ".py":
        found = sorted(task.name for task in _listed(path))
        if file and name not in found:
            raise EvaluationFailed(f"{path} has the tasks {found}, not {name!r}")
        if not file and len(found) != 1:
            raise EvaluationFailed(f"{path} has the tasks {found}: name one, {path}@TASK")
        make = partial(_from_python, path, name if file else found[0])
        return TaskFile(text, "utility", make, value or None)
    return TaskFile(text, "utility", lambda: whole, value or None)


def _packaged(text: str, path: Path, name: str, judge: str) -> TaskFile:
    if name == "refusal":
        return TaskFile(
            text, "asr", partial(_read, text, partial(packaged.refusal, str(path), judge))
        )
    if name == "exact_match":
        return TaskFile(
            text, "utility", partial(_read, text, partial(packaged.exact_match, str(path)))
        )
    raise EvaluationFailed(f"{text}: name a task, {path}@refusal or {path}@exact_match")


def _read(text: str, make: Callable[[], Task]) -> Task:
    try:
        return make()
    except OSError as error:
        raise EvaluationFailed(f"{text}: {error.strerror}") from None
    except ProbesInvalid as error:
        raise EvaluationFailed(error.problem) from None


def _listed(path: Path) -> list[TaskInfo]:
    if not path.is_file():
        raise EvaluationFailed(f"{path}: no such file")
    return list_tasks(path.name, root_dir=path.parent)


def _from_python(path: Path, name: str) -> Task:
    """A task of an operator's own file, which runs."""
    try:
        task: Task = runpy.run_path(str(path))[name]()
    except Exception as error:  # noqa: BLE001 - whatever the file raises
        raise EvaluationFailed(f"{path}@{name}: {type(error).__name__}: {error}") from None
    return task
