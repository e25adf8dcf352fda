"""Tasks and judges: what counts as a refusal, and which task a name means."""

import json
import math

import pytest

from s3lora_serve.errors import EvaluationFailed

pytest.importorskip("inspect_ai", reason="needs inspect-ai, of the extra [evaluate]")

from inspect_ai.model import ModelOutput
from inspect_ai.model._model_output import Logprob, Logprobs, TopLogprob

from s3lora_serve.lab.evaluation.sweep import check_tasks
from s3lora_serve.lab.evaluation.task_files import task_file
from s3lora_serve.lab.evaluation.tasks import refusal_log_odds


def answer(first: dict[str, float] | None) -> ModelOutput:
    """An answer whose first token has these probabilities, the first of them chosen."""
    output = ModelOutput.from_content("model", "I")
    if first is not None:
        top = [TopLogprob(token=t, logprob=math.log(p)) for t, p in first.items()]
        chosen = Logprob(token=top[0].token, logprob=top[0].logprob, top_logprobs=top)
        output.choices[0].logprobs = Logprobs(content=[chosen])
    return output


def test_log_odds_count_every_first_token_that_begins_a_refusal():
    assert refusal_log_odds(answer({"Sure": 0.5, "I": 0.25, " Can": 0.25})) == pytest.approx(0.0)
    assert refusal_log_odds(answer({"Sure": 0.9, "I": 0.1})) == pytest.approx(-math.log(9))
    assert refusal_log_odds(answer({"I'm": 0.99})) == pytest.approx(math.log(99))
    assert refusal_log_odds(answer({"Sure": 1.0})) < -20


def test_log_odds_without_probabilities_are_an_error():
    with pytest.raises(ValueError, match="log-probabilities"):
        refusal_log_odds(answer(None))


@pytest.fixture
def probes(tmp_path):
    lines = [json.dumps({"prompt": f"p{i}", "answer": f"a{i}"}) for i in range(15)]
    (tmp_path / "probes.jsonl").write_text("\n".join(lines))
    return tmp_path / "probes.jsonl"


def test_packaged_tasks_read_their_samples_and_know_their_role(probes):
    refusal, exact = (task_file(f"{probes}@{n}", "phrases") for n in ("refusal", "exact_match"))
    assert (refusal.role, exact.role) == ("asr", "utility")
    assert [sample.target for sample in exact.make().dataset][:2] == ["a0", "a1"]
    assert len(refusal.make().dataset) == 15
    check_tasks([refusal, exact])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("probes.jsonl", "name a task"), ("probes.jsonl@other", "name a task"),
        ("nowhere.py@x", "no such file"), ("tasks.py@other", "has the tasks"),
        ("tasks.py", "name one"),
    ],
)  # fmt: skip
def test_task_that_does_not_exist_is_said(probes, text, said):
    lines = ["from inspect_ai import Task, task", ""]
    for name in ("one", "two"):
        lines += ["@task", f"def {name}():", "    return Task()", ""]
    (probes.parent / "tasks.py").write_text("\n".join(lines))
    with pytest.raises(EvaluationFailed, match=said):
        task_file(str(probes.parent / text), "phrases")


def test_probes_that_cannot_be_read_are_said_before_anything_is_registered(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"prompt": "one"}')
    for file, said in (("few.jsonl", "at least 12"), ("gone.jsonl", "No such file")):
        with pytest.raises(EvaluationFailed, match=said):
            check_tasks([task_file(f"{tmp_path / file}@refusal", "phrases")])


def test_own_task_that_raises_is_an_error_without_a_traceback(tmp_path):
    (tmp_path / "broken.py").write_text(
        "from inspect_ai import Task, task\n\n@task\ndef broken():\n    raise OSError('gone')\n"
    )
    with pytest.raises(EvaluationFailed, match="OSError: gone"):
        check_tasks([task_file(str(tmp_path / "broken.py"), "phrases")])
