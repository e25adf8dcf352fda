"""A front end in which the gate does not decide starts only where the policy allows it."""

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.launcher.front_end import front_end
from s3lora_serve.vllm_plugin.front_end import RUST_SWITCH, asked_for

ASKING = {
    "the Rust front end": ({RUST_SWITCH: "1"}, ()),
    "its gRPC server too": ({RUST_SWITCH: "1"}, ("--grpc-port", "50051")),
    "the gRPC server": ({}, ("--port", "1", "--grpc")),
}


@pytest.mark.parametrize("case", ASKING)
def test_serve_does_not_start_a_front_end_that_is_not_guarded(case):
    environment, arguments = ASKING[case]
    done = CliRunner().invoke(app, ["serve", "some-model", *arguments], env=environment)
    assert done.exit_code == 2
    assert "S3LORA-912" in done.stderr
    assert "unguarded_frontends: allow" in done.stderr


@pytest.mark.parametrize("case", ASKING)
@pytest.mark.parametrize(("word", "starts"), [("refuse", False), ("allow", True)])
def test_the_policy_decides_whether_it_starts_and_doctor_says_so(
    tmp_path, monkeypatch, case, word, starts
):
    environment, arguments = ASKING[case]
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"unguarded_frontends: {word}\n")
    for name, value in (environment | {"S3LORA_POLICY": str(policy)}).items():
        monkeypatch.setenv(name, value)
    check = front_end(arguments)
    assert not check.passed
    assert check.essential != starts
    assert check.detail.startswith("S3LORA-912: ")


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [({}, ()), ({RUST_SWITCH: "0"}, ("--port", "1")), ({}, ("--headless",))],
)
def test_vllms_python_api_server_is_guarded(environment, arguments):
    assert asked_for(environment, arguments) is None
