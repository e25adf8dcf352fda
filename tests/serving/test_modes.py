"""Audit mode changes no output; off mode does nothing."""

import pytest

from s3lora_serve import strip_adapter
from s3lora_serve.policy.file import read_policy
from tests.serving.conftest import TOP_K, answers, log_of_failed_start
from tests.support.adapters import copy_with, diverged, key
from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving


def test_audit_mode_changes_no_output_and_says_what_enforce_would_do(auditing, expected, spiked):
    response = auditing.load("audited", spiked)
    assert response.status_code == 200
    assert response.headers["X-S3LoRA-Decision"] == "stripped"
    assert answers(auditing, "audited") == expected["whole"]
    metrics = auditing.metrics()
    assert metrics['s3lora_admissions_total{decision="stripped",mode="audit"}'] >= 1
    stripped = [v for k, v in metrics.items() if k.startswith("s3lora_modules_stripped_total")]
    assert len(stripped) > 28
    assert sum(stripped) == 0
    assert f"{TOP_K} of 28 modules sharp" in auditing.log.read_text()


def test_audit_mode_admits_what_the_policy_would_refuse(auditing, spiked, tmp_path):
    folder = copy_with(spiked, tmp_path / "loud", lora_alpha=10_000)
    response = auditing.load("loud", folder)
    assert response.status_code == 200
    assert response.headers["X-S3LoRA-Decision"] == "rejected"


def test_audit_mode_never_serves_what_could_not_be_scored(auditing, expected, spiked, tmp_path):
    metric = 's3lora_quarantined_total{reason="S3LORA-109"}'
    before = auditing.metrics()[metric]
    response = auditing.load("nan", copy_with(spiked, tmp_path / "nan", diverged))
    assert response.status_code == 200
    assert response.headers["X-S3LoRA-Decision"] == "rejected"
    assert answers(auditing, "nan") == expected["base"]
    assert auditing.metrics()[metric] == before + 1


def test_audit_mode_quarantines_what_does_not_fit_the_model(auditing, expected, spiked, tmp_path):
    def widen(tensors):
        name = key("model.layers.0.self_attn.q_proj", "A")
        tensors[name] = tensors[name].repeat(1, 2)

    response = auditing.load("wide", copy_with(spiked, tmp_path / "wide", widen))
    assert (response.status_code, response.headers["X-S3LoRA-Decision"]) == (200, "rejected")
    assert answers(auditing, "wide") == expected["base"]


def test_what_strip_writes_is_served_as_the_gate_serves_the_whole(
    auditing, expected, spiked, policy_file, tmp_path
):
    strip_adapter(spiked, tmp_path / "written", read_policy(policy_file))
    assert auditing.load("written", tmp_path / "written").status_code == 200
    assert answers(auditing, "written") == expected["by-hand"]


def test_off_does_nothing(switched_off, expected, spiked):
    response = switched_off.load("whole", spiked)
    assert response.status_code == 200
    assert "X-S3LoRA-Decision" not in response.headers
    assert answers(switched_off, "whole") == expected["whole"]
    metrics = switched_off.metrics()
    assert [v for k, v in metrics.items() if k.startswith("s3lora_gate_active")] == [0]
    assert metrics['s3lora_admissions_total{decision="stripped",mode="enforce"}'] == 0
    assert switched_off.get("/s3lora/status").status_code == 503


def test_vllm_serve_without_the_launcher_is_guarded_too(
    model, spiked, expected, policy_file, workplace
):
    metrics = workplace / "metrics"
    metrics.mkdir()
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy_file),
        "VLLM_PLUGINS": "s3lora",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    with Server(model, workplace / "plain.log", (), environment, guarded=False) as server:
        assert server.load("plain", spiked).headers["X-S3LoRA-Decision"] == "stripped"
        assert answers(server, "plain") == expected["by-hand"]
        assert server.metrics()['s3lora_admissions_total{decision="stripped",mode="enforce"}'] == 1


EXTENSION = ("--worker-extension-cls", "s3lora_serve.vllm_plugin.worker.GuardedWorker")


def test_the_worker_extension_guards_where_the_plugin_is_left_out(
    model, spiked, expected, policy_file, workplace, tmp_path
):
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy_file), "VLLM_PLUGINS": ""}
    with Server(model, workplace / "left-out.log", EXTENSION, environment, guarded=False) as server:
        assert server.load("left-out", spiked).status_code == 200
        assert answers(server, "left-out") == expected["by-hand"]
        # The API server is vLLM's own here, so only the answers and the log show the refusal.
        assert server.load("bad", copy_with(spiked, tmp_path / "bad", peft_type="IA3"))
        assert answers(server, "bad") == expected["base"]
        assert "'bad' is quarantined" in server.log.read_text()


def test_a_worker_whose_gate_cannot_be_imported_does_not_start(model, workplace, tmp_path):
    shadow = tmp_path / "shadow"
    (shadow / "s3lora_serve").mkdir(parents=True)
    (shadow / "s3lora_serve" / "__init__.py").write_text("raise ImportError('broken')")
    environment = OPEN_LOADING | {"PYTHONPATH": str(shadow)}
    server = Server(
        model, workplace / "broken.log", EXTENSION, environment, guarded=False, folder=tmp_path
    )
    assert "ImportError: broken" in log_of_failed_start(server)
