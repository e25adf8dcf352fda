"""Recording rules and alerts, tested with promtool."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.lab.planner.planner_metrics import PlannerMetrics
from s3lora_serve.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "s3lora.rules.yaml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: prometheus)")


def rules(kind):
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def promtool(*arguments):
    return subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True)


@needs_promtool
def test_prometheus_takes_the_rules():
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_when_it_should_not():
    cases = Path(__file__).with_name("rules_test.yaml")
    done = promtool("test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [
        alert
        for case in yaml.safe_load(cases.read_text())["tests"]
        for alert in case["alert_rule_test"]
    ]
    fired = {alert["alertname"] for alert in found if alert.get("exp_alerts")}
    silent = {alert["alertname"] for alert in found if not alert.get("exp_alerts")}
    assert fired == silent == {rule["alert"] for rule in rules("alert")}


@needs_promtool
def test_a_broken_rule_is_noticed(tmp_path):
    """Without this the tests above would prove nothing."""
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("> 0\n", "> 100\n"))
    cases = Path(__file__).with_name("rules_test.yaml").read_text()
    broken = tmp_path / "rules_test.yaml"
    broken.write_text(cases.replace("../../deploy/prometheus/s3lora.rules.yaml", "rules.yaml"))
    done = promtool("test", "rules", broken)
    assert done.returncode != 0
    assert "S3LoRAQuarantine" in done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules("alert")])
def test_each_alert_has_a_section_in_the_runbook(alert):
    [rule] = [rule for rule in rules("alert") if rule["alert"] == alert]
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (.*)$", (ROOT / file).read_text(), re.MULTILINE)
    assert alert in headings
    assert anchor == alert.lower()


@pytest.fixture(scope="module")
def registry():
    """Every metric of the gate and of the planner."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.activate("digest", "enforce", "1")
    metrics.set_model_modules({("0", "q_proj")})
    metrics.serve(scan_adapter(Path("/nowhere"), Policy()))
    PlannerMetrics(registry)
    return registry


@needs_promtool
def test_promtool_has_no_complaint_about_the_metrics(registry):
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=generate_latest(registry), capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_rules_name_metrics_that_exist(registry):
    known = {sample.name for family in registry.collect() for sample in family.samples}
    text = " ".join(rule["expr"] for rule in rules("expr"))
    recorded = {rule["record"] for rule in rules("record")}
    named = set(re.findall(r"(?<![\w:])s3lora_\w+", text))
    assert named <= known
    assert set(re.findall(r"\w+:s3lora_[\w:]+", text)) <= recorded
