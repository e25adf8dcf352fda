"""Metrics report decisions, and nothing that an adapter's owner chooses."""

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.admission.verdict import with_rejection
from s3lora_serve.errors import Reason
from s3lora_serve.policy.method import Strip
from s3lora_serve.telemetry.metrics import Metrics

TWO = Policy(strip=Strip(top_k=2))
PLACES = [(str(i), p) for i in range(4) for p in ("q_proj", "v_proj", "down_proj")]


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    made = Metrics(registry)
    made.set_model_modules(PLACES)
    return made


def test_closed_label_sets_exist_at_zero_from_the_start(registry, metrics):
    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    for decision in ("admitted", "stripped", "rejected"):
        for mode in ("enforce", "audit"):
            assert value("s3lora_admissions_total", decision=decision, mode=mode) == 0
    assert value("s3lora_modules_stripped_total", layer="3", projection="q_proj") == 0
    assert value("s3lora_modules_scored_total", projection="other") == 0
    assert value("s3lora_admission_seconds_count", phase="strip") == 0
    assert value("s3lora_quarantined_total", reason="S3LORA-403") == 0
    for selector in ("plan", "index"):
        assert value("s3lora_selections_total", selected_by=selector) == 0
    assert value("s3lora_gate_active") is None, (
        "a value would count as a worker that is not guarded"
    )


def test_an_admission_is_counted_as_its_verdict_says(registry, metrics, trained):
    verdict = scan_adapter(trained, TWO)
    metrics.record(verdict, "cpu")
    labels = {"decision": "stripped", "mode": "enforce"}
    assert registry.get_sample_value("s3lora_admissions_total", labels) == 1
    scored = {"projection": "down_proj"}
    assert registry.get_sample_value("s3lora_modules_scored_total", scored) == 4
    total = sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "s3lora_modules_stripped_total"
    )
    assert total == 2


def test_what_chose_the_modules_is_counted_unless_the_adapter_is_rejected(
    registry, metrics, trained
):
    verdict = scan_adapter(trained, TWO)
    metrics.record(verdict, "cpu")
    metrics.record(replace(verdict, selected_by="plan"), "cpu")
    metrics.record(with_rejection(verdict, Reason("S3LORA-208", "no plan of its own")), "cpu")
    for selector in ("plan", "index"):
        labels = {"selected_by": selector}
        assert registry.get_sample_value("s3lora_selections_total", labels) == 1


def test_audit_mode_counts_no_module_as_stripped(registry, metrics, trained):
    metrics.record(scan_adapter(trained, TWO.model_copy(update={"mode": "audit"})), "cpu")
    text = generate_latest(registry).decode()
    stripped = [line for line in text.splitlines() if line.startswith("s3lora_modules_stripped_t")]
    assert stripped
    assert all(line.endswith(" 0.0") for line in stripped)


def test_modules_the_base_model_does_not_have_are_other(registry, metrics, trained):
    metrics.record(scan_adapter(trained, TWO), "cpu")
    text = generate_latest(registry).decode()
    assert 's3lora_modules_scored_total{projection="other"} 16.0' in text
    assert "up_proj" not in text


def test_gate_is_inactive_when_the_policy_is_off(registry, metrics):
    metrics.activate("sha256:x", "off", "1")
    assert registry.get_sample_value("s3lora_gate_active") == 0
    metrics.activate("sha256:x", "enforce", "1")
    assert registry.get_sample_value("s3lora_gate_active") == 1
