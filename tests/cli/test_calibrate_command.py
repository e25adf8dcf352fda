"""`s3lora calibrate`: the plan it writes, its exit codes, and that nothing is half-written."""

import json

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.plans.file import read_plan
from tests.support.adapters import copy_with
from tests.support.tiny_chat import one_thread


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def _run(chat, *more, **inputs):
    files = {name: inputs.get(name, getattr(chat, name)) for name in ("harmful", "benign")}
    options = [part for name, file in files.items() for part in (f"--{name}", file)]
    folders = (inputs.get("base", chat.base), inputs.get("adapter", chat.adapter))
    command = ["calibrate", *folders, *options, "--dtype", "float32", *more]
    return CliRunner().invoke(app, [str(part) for part in command])


@pytest.fixture(scope="module")
def done(chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    page = folder.parent / f"{folder.name}.html"
    run = _run(
        chat, "--skill", chat.skill, "-o", folder, "-o", page, "--max-asr", "0.15", "--compare"
    )
    return run, folder, page


def test_plan_in_a_folder_is_named_after_the_adapters_digest(done, chat):
    run, folder, _ = done
    assert run.exit_code == 0, run.stderr
    [file] = folder.iterdir()
    plan = read_plan(file)
    assert file.name == plan.adapter_digest.removeprefix("sha256:") + ".json"
    assert plan.base_model == str(chat.base)
    assert {part.kind for part in plan.probes} == {"harmful", "benign", "skill"}
    assert file.stat().st_mode & 0o022 == 0


def test_table_shows_before_and_after_on_held_out_probes(done):
    run, _, _ = done
    assert "before" in run.stdout
    assert "after" in run.stdout
    assert "transformed" in run.stdout
    assert isinstance(run.exception, SystemExit | None)


def test_page_of_the_frontier_loads_nothing(done):
    _, _, page = done
    html = page.read_text()
    assert "<svg" in html
    assert "src=" not in html
    assert "whole modules" in html


def test_json_has_plan_and_frontier_without_the_transforms(chat, tmp_path):
    run = _run(
        chat, "--skill", chat.skill, "-o", tmp_path / "plan.json", "--steps", "2",
        "--format", "json", "--accept-best",
    )  # fmt: skip
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    assert isinstance(found["reached"], bool)
    assert found["frontier"][0]["strength"] == 0
    assert not any("transform" in module for module in found["plan"]["modules"])
    assert read_plan(tmp_path / "plan.json").after is not None


def test_missed_target_writes_no_plan_and_gives_the_frontier(chat, tmp_path):
    # What a few steps leave of so large an update is more than the base model's refusals bear.
    huge = chat._replace(adapter=copy_with(chat.adapter, tmp_path / "huge", lora_alpha=500))
    run = _run(huge, "--skill", chat.skill, "-o", tmp_path / "plan.json", "--steps", "1")
    assert run.exit_code == 1
    assert "S3LORA-908" in run.stderr
    assert "calibration split" in run.stdout
    assert not (tmp_path / "plan.json").exists()


def test_unaligned_base_exits_with_1(chat, tmp_path):
    run = _run(chat, "-o", tmp_path / "plan.json", harmful=chat.benign)
    assert (run.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "S3LORA-907" in run.stderr


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({"harmful": "probes"}, "S3LORA-905"),
        ({"benign": "probes"}, "S3LORA-905"),
        ({"base": "folder"}, "S3LORA-906"),
        ({"adapter": "folder"}, "S3LORA-101"),
        ({"harmful": "missing"}, "No such file"),
        ({"base": "missing"}, "No such file"),
    ],
    ids=str,
)
def test_bad_input_exits_with_2_and_a_code(chat, tmp_path, bad, code):
    (tmp_path / "folder").mkdir()
    (tmp_path / "probes").write_text('{"question": "x"}\n')
    inputs = {key: tmp_path / name for key, name in bad.items()}
    run = _run(chat, "-o", tmp_path / "plan.json", **inputs)
    assert run.exit_code == 2
    assert code in run.stderr
    assert isinstance(run.exception, SystemExit | None)
    assert not (tmp_path / "plan.json").exists()


def test_two_plans_at_once_are_wrong_usage(chat, tmp_path):
    run = _run(chat, "-o", tmp_path / "a.json", "-o", tmp_path / "b.json")
    assert run.exit_code == 2
    assert "takes one plan" in run.stderr
