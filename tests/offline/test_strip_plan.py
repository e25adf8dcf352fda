"""`s3lora strip` with a plan: the adapter on disk is what a server would serve."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter, strip_adapter
from s3lora_serve.cli import app
from s3lora_serve.offline.provenance import PROVENANCE_NAME
from s3lora_serve.offline.sarif import PLANNED, SarifLog
from tests.support.adapters import CONFIG, WEIGHTS, key
from tests.support.plans import install, keep_out, plan_for, read, small_adapter

FIRST, SECOND, THIRD = (f"model.layers.{layer}.self_attn.q_proj" for layer in range(3))


@pytest.fixture
def folder(tmp_path):
    return small_adapter(tmp_path / "adapter")


@pytest.fixture
def plan(folder):
    return plan_for(read(folder), {FIRST: keep_out(read(folder).modules[0].A)}, {SECOND})


@pytest.fixture
def file(plan, tmp_path):
    return install(plan, tmp_path / "plans")


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


def test_it_writes_the_new_factors_without_the_stripped_modules(folder, plan, file, tmp_path):
    done = run("strip", "--plan", file, folder, tmp_path / "out")
    assert done.exit_code == 0, done.output
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(before) - set(after) == {key(SECOND, side) for side in "AB"}
    T = plan.modules[0].matrix().double()
    assert torch.equal(after.pop(key(FIRST, "B")), (before[key(FIRST, "B")].double() @ T).float())
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    targets = json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]
    assert targets == [FIRST, THIRD]
    statement = json.loads((tmp_path / "out" / PROVENANCE_NAME).read_text())
    parameters = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert parameters["planDigest"] == plan.digest
    assert parameters["transformedModules"] == [FIRST]
    assert parameters["strippedModules"] == [SECOND]


@pytest.mark.parametrize("mode", ["enforce", "audit"])
def test_the_policys_plan_is_used_as_the_gate_would(folder, file, tmp_path, mode):
    policy = Policy(plans=file.parent, mode=mode)
    by_policy = strip_adapter(folder, tmp_path / "one", policy, "cpu")
    assert by_policy.transformed == (FIRST,)
    run("strip", "--plan", file, folder, tmp_path / "two")
    written = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two")]
    assert written[0] == written[1]


def test_a_plan_for_another_adapter_writes_nothing(file, tmp_path):
    other = small_adapter(tmp_path / "other", layers=2)
    done = run("strip", "--plan", file, other, tmp_path / "out", COLUMNS="200")
    assert done.exit_code == 1
    assert "S3LORA-208" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("contents", [None, "{}", "no plan"])
def test_a_plan_that_cannot_be_read_is_wrong_usage(folder, tmp_path, contents):
    file = tmp_path / "plan.json"
    if contents is not None:
        file.write_text(contents)
    done = run("strip", "--plan", file, folder, tmp_path / "out")
    assert done.exit_code == 2
    assert str(file) in done.stderr
    assert not (tmp_path / "out").exists()


def test_scan_shows_what_the_plan_chose(folder, plan, file):
    done = run("scan", folder, S3LORA_PLANS=str(file.parent), COLUMNS="200")
    assert done.exit_code == 0
    assert "stripped (plan)" in done.stdout
    assert "1 stripped, 1 transformed" in done.stdout
    assert "25.0%" in done.stdout
    done = run("scan", folder, "--format", "json", S3LORA_PLANS=str(file.parent))
    [found] = json.loads(done.stdout)["adapters"]
    assert found["plan_digest"] == plan.digest
    assert [module["transformed"] for module in found["modules"]] == [True, False, False]


def test_sarif_names_the_plan_and_calls_nothing_sharp(folder, plan, file):
    log = SarifLog()
    log.add(scan_adapter(folder, Policy(plans=file.parent)))
    [result] = log.as_json()["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == (PLANNED, "note")
    assert plan.digest in result["message"]["text"]
