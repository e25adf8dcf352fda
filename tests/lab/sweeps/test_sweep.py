"""`s3lora scan` over many adapters: formats, resumption, and failures that stop no other."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from s3lora_serve.cli import app
from tests.support.adapters import WEIGHTS, copy_with, diverged


@pytest.fixture
def hub(trained, tmp_path) -> Path:
    """Thirteen adapters of three tenants; one is broken, one diverged."""
    root = tmp_path / "hub"
    for tenant in ("acme", "globex", "initech"):
        for i in range(4):
            copy_with(trained, root / tenant / f"v{i}")
    (root / "acme" / "v1" / WEIGHTS).write_bytes(b"nothing")
    copy_with(trained, root / "nan", diverged)
    (root / "nan").rename(root / "initech" / "v9")
    return root


def run(*arguments, **more):
    return CliRunner().invoke(app, ["scan", *map(str, arguments)], **more)


def decisions_of(text):
    return {Path(v["path"]).parent.name + "/" + v["name"]: v["decision"]
            for v in map(json.loads, text.splitlines())}  # fmt: skip


def test_each_adapter_is_a_line_and_broken_ones_stop_no_other(hub):
    done = run(hub, "--format", "jsonl")
    assert done.exit_code == 1
    decisions = decisions_of(done.stdout)
    assert len(decisions) == 13
    assert [name for name, word in decisions.items() if word == "rejected"] == [
        "acme/v1", "initech/v9",
    ]  # fmt: skip


def test_several_processes_say_the_same_in_the_same_order(hub):
    def verdicts(jobs):
        done = run(hub, "--format", "jsonl", "--jobs", jobs)
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in done.stdout.splitlines()]  # fmt: skip

    assert verdicts(2) == verdicts(1)


def test_patterns_and_a_list_on_standard_input_name_adapters_too(hub):
    done = run(f"{hub}/*/v[01]", "--format", "jsonl")
    assert set(decisions_of(done.stdout)) == {f"{t}/v{i}" for t in ("acme", "globex", "initech")
                                      for i in (0, 1)}  # fmt: skip
    listed = run("-", "--format", "jsonl", input=f"{hub}/acme/v0\n\n{hub}/globex\n")
    assert len(decisions_of(listed.stdout)) == 5
    nothing = run(f"{hub}/*/w*")
    assert nothing.exit_code == 2
    assert "No such file" in nothing.stderr


def test_files_stand_for_their_folders_as_the_pre_commit_hook_gives_them(hub):
    [hook] = yaml.safe_load(
        Path(__file__).parents[3].joinpath(".pre-commit-hooks.yaml").read_text()
    )
    files = sorted(hub.glob("acme/*/*"))
    chosen = [file for file in files if re.search(hook["files"], str(file))]
    assert len(files) > len(chosen) == 4
    program, *command = hook["entry"].split()
    assert (program, command[0]) == ("s3lora", "scan")
    done = run(*command[1:], *chosen, "--format", "jsonl")
    assert set(decisions_of(done.stdout)) == {f"acme/v{i}" for i in range(4)}
    assert done.exit_code == 1


def test_an_interrupted_sweep_resumes_where_it_stopped(hub, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(hub, "--format", "jsonl", "-o", whole).exit_code == 1
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:5]) + lines[5][:100])
    complete = cut.read_text()[: len("".join(lines[:5]))]
    assert run(hub, "--format", "jsonl", "-o", cut, "--resume").exit_code == 1
    assert cut.read_text().startswith(complete)
    assert decisions_of(cut.read_text()) == decisions_of(whole.read_text())
    assert len(cut.read_text().splitlines()) == 13
    again = run(hub, "--format", "jsonl", "-o", cut, "--resume")
    assert again.exit_code == 1, "earlier rejections no longer count"
    assert len(cut.read_text().splitlines()) == 13


def test_no_file_is_overwritten_and_no_other_file_is_resumed(hub, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text("mine\n")
    for more in ([], ["--resume"]):
        done = run(hub, "--format", "jsonl", "-o", file, *more)
        assert done.exit_code == 2
        assert str(file) in done.stderr
    assert file.read_text() == "mine\n"
    assert run(hub, "--resume").exit_code == 2
    other = tmp_path / "other.jsonl"
    run(hub / "acme" / "v0", "--format", "jsonl", "-o", other)
    policy = tmp_path / "policy.yaml"
    policy.write_text("strip: {top_k: 1}\n")
    done = run(hub, "--format", "jsonl", "-o", other, "--resume", "--policy", policy)
    assert done.exit_code == 2
    assert "another policy" in done.stderr


def test_an_adapter_that_kills_its_process_is_refused_and_the_others_are_scored(hub, tmp_path):
    killing = """
import os, pathlib
from s3lora_serve.adapter import private_copy
taken = private_copy.copy_adapter
def copy_adapter(folder, *more):
    if folder.path.name == "v2" and folder.path.parent.name == "globex":
        os.kill(os.getpid(), 9)
    return taken(folder, *more)
private_copy.copy_adapter = copy_adapter
"""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(killing)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "s3lora_serve", "scan", str(hub), "--format", "jsonl"]
    done = subprocess.run(
        [*command, "--jobs", "2"], env=os.environ | {"PYTHONPATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    folders = sorted(str(file.parent) for file in hub.glob(f"*/*/{WEIGHTS}"))
    verdicts = {v["path"]: v for v in map(json.loads, done.stdout.splitlines())}
    assert list(verdicts) == folders
    codes = {path: v["reason"]["code"] for path, v in verdicts.items() if v["reason"]}
    assert codes == {
        f"{hub}/acme/v1": "S3LORA-104",
        f"{hub}/globex/v2": "S3LORA-401",
        f"{hub}/initech/v9": "S3LORA-109",
    }


def test_the_progress_bar_is_shown_on_a_terminal_and_not_in_the_output(hub):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "s3lora_serve", "scan", str(hub), "--format", "jsonl"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(theirs)
        text, shown = process.stdout.read(), b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other side of the terminal is closed
            pass
    os.close(ours)
    assert len(decisions_of(text.decode())) == 13
    assert b"/13" in shown
    assert b"/s" in shown
