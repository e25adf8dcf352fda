"""`s3lora serve` enables only the resolvers that were asked for and that the policy allows."""

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.launcher import vllm_command
from s3lora_serve.launcher.resolvers import FILESYSTEM, FOLDER, HUB, REPOSITORIES, resolvers


def plugins(**variables):
    made = vllm_command.environment(variables | {"PROMETHEUS_MULTIPROC_DIR": "/x"}, lambda: None)
    return made["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    ("variables", "enabled"),
    [
        ({}, set()),
        ({FOLDER: ""}, set()),
        ({FOLDER: "/adapters"}, {FILESYSTEM}),
        ({REPOSITORIES: "acme/adapters"}, set()),
        ({"VLLM_PLUGINS": HUB, REPOSITORIES: "acme/adapters"}, {HUB}),
        ({"VLLM_PLUGINS": f"{HUB},{FILESYSTEM}"}, {HUB, FILESYSTEM}),
        ({"VLLM_PLUGINS": "mine", FOLDER: "/adapters"}, set()),
    ],
)
def test_only_resolvers_that_were_asked_for_are_enabled(variables, enabled):
    named = plugins(**variables)
    assert {FILESYSTEM, HUB} & set(named) == enabled
    assert "s3lora" in named


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """A policy with limits.roots."""
    file = tmp_path / "policy.yaml"
    file.write_text(f"limits: {{roots: [{tmp_path}]}}\n")
    monkeypatch.setenv("S3LORA_POLICY", str(file))


@pytest.mark.usefixtures("roots")
def test_a_server_with_roots_and_the_hub_resolver_does_not_start():
    environment = {"VLLM_PLUGINS": HUB, REPOSITORIES: "acme/adapters"}
    done = CliRunner().invoke(app, ["serve", "some-model"], env=environment)
    assert done.exit_code == 2
    assert "limits.roots" in done.stderr
    assert HUB in done.stderr


@pytest.mark.parametrize(
    ("variables", "passed", "said"),
    [
        ({}, True, "none"),
        ({FOLDER: "/"}, True, "filesystem, below /"),
        ({FOLDER: "/nowhere"}, False, "not a folder"),
        ({REPOSITORIES: "acme/adapters"}, True, "VLLM_PLUGINS does not name"),
        ({REPOSITORIES: "acme/adapters", "VLLM_PLUGINS": HUB}, True, "hub, of acme/adapters"),
    ],
)
def test_doctor_says_where_names_are_looked_up(monkeypatch, variables, passed, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = resolvers()
    assert check.passed == passed
    assert said in check.detail
