"""`policy check` and `doctor` know the folder of plans."""

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.launcher.checks import checks


@pytest.fixture
def plans(tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir(mode=0o755)
    (folder / f"{'a' * 64}.json").write_text("{}")
    return folder


@pytest.fixture
def policy(plans, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text(f"plans: {plans}\nrequire_plan: true\n")
    return file


def check_policy(file):
    return CliRunner().invoke(app, ["policy", "check", str(file)])


def check_of_plans():
    return next((check for check in checks() if check.name == "plans"), None)


def test_policy_check_refuses_plans_that_others_can_write(policy, plans):
    assert check_policy(policy).exit_code == 0
    plans.chmod(0o777)
    done = check_policy(policy)
    assert done.exit_code == 2
    assert "written by others" in done.stderr
    policy.write_text("plans: /nowhere\n")
    assert check_policy(policy).exit_code == 2


def test_doctor_counts_plans_and_names_a_file_that_is_never_read(policy, plans, monkeypatch):
    assert check_of_plans() is None
    monkeypatch.setenv("S3LORA_POLICY", str(policy))
    found = check_of_plans()
    assert found.passed
    assert f"1 in {plans}" in found.detail
    (plans / "ACME.json").write_text("{}")
    found = check_of_plans()
    assert (found.passed, found.essential) == (False, False)
    assert "'ACME.json' is not" in found.detail


@pytest.mark.parametrize("how", ["writable", "gone"])
def test_a_bad_folder_of_plans_is_an_essential_failure(policy, plans, monkeypatch, how):
    monkeypatch.setenv("S3LORA_POLICY", str(policy))
    if how == "writable":
        plans.chmod(0o777)
    else:
        plans.rename(plans.with_name("elsewhere"))
    found = check_of_plans()
    assert (found.passed, found.essential) == (False, True)
    assert "S3LORA-901" in found.detail
