"""The dashboard equals its generated form, and each query has data on a real Prometheus."""

import json
import math
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from deploy.generate import generated
from tests.serving.conftest import answers
from tests.support.adapters import WEIGHTS, copy_with, diverged
from tests.support.prometheus import Prometheus, needs_prometheus
from tests.support.references import reference_for_model
from tests.support.server import OPEN_LOADING, Server, free_port

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "s3lora.rules.yaml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "s3lora-gate.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel, target["expr"]) for panel in PANELS for target in panel["targets"]]
NAMES = [f"{panel['title']} {panel['targets'].index(target)}"
         for panel in PANELS for target in panel["targets"]]  # fmt: skip
JOB = "vllm"


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_what_is_generated_is_what_is_checked_in(path):
    assert path.read_text() == generated()[path], "run `make generate`"


def test_no_panel_hides_another():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_every_panel_says_what_it_shows_and_is_for_the_chosen_replicas():
    for panel, expression in QUERIES:
        assert panel["description"], panel["title"]
        if "s3lora_planner" in expression:  # a job of its own, which replicas do not choose
            continue
        chosen = expression.count('{job=~"$job", instance=~"$instance"')
        assert chosen == expression.count("{job=~") > 0, panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


POLICY = """
scorer: {{reference: {reference}}}
strip: {{top_k: 3}}
rules:
  - {{match: {{adapter: "aligned-*"}}, scorer: {{name: safe-lora}}, action: project}}
"""


@pytest.fixture(scope="module")
def watched(model, trained, spiked, workplace):
    """A Prometheus that scraped a guarded vLLM through every event that the panels show."""
    state = workplace / "dashboard-state"
    policy = workplace / "dashboard-policy.yaml"
    folder = workplace / "dashboard-reference"
    folder.mkdir()
    policy.write_text(POLICY.format(reference=reference_for_model(model, folder, rank=16)))
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy), "S3LORA_STATE_DIR": str(state)}
    arguments = ("--max-cpu-loras", "2", "--max-loras", "1")
    with Server(model, workplace / "dashboard.log", arguments, environment) as server:
        targets = [f"127.0.0.1:{server.port}", f"127.0.0.1:{(port := free_port())}"]
        with (
            _planner(server, model, workplace, port),
            Prometheus(workplace / "prometheus", JOB, targets, RULES) as prometheus,
        ):
            _cause_events(server, trained, spiked, workplace, state)
            prometheus.until(
                lambda: (prometheus.value("sum(increase(s3lora_quarantined_total[1m]))") or 0) > 0
            )
            yield prometheus


@contextmanager
def _planner(server, model, workplace, port):
    """A planner whose base model answers every prompt, so that it can plan nothing."""
    plans, probes = workplace / "dashboard-plans", workplace / "dashboard-probes.jsonl"
    plans.mkdir()
    probes.write_text("".join(f'{{"prompt": "word {n}"}}\n' for n in range(20)))
    command = [
        sys.executable, "-m", "s3lora_serve", "planner", server.url(""), "--base", model,
        "--harmful", probes, "--benign", probes, "--plans", plans, "--device", "cpu",
        "--dtype", "float32", "--interval", "1", "--metrics-port", port,
    ]  # fmt: skip
    with subprocess.Popen([str(part) for part in command]) as planner:
        try:
            yield
        finally:
            planner.terminate()


def _cause_events(server, trained, spiked, workplace, state):
    """Have adapters stripped, rejected, evicted, reloaded, and damaged in the store."""
    bad = copy_with(trained, workplace / "dashboard-bad", diverged)
    for round_ in range(3):
        tenants = {"acme": trained, "globex": spiked, "umbrella": trained, "aligned": trained}
        for name, folder in tenants.items():
            server.load(f"{name}-{round_}", folder)
            answers(server, f"{name}-{round_}")
        assert server.load("initech", bad).status_code == 400
        server.complete("base", "two words", tokens=20)
        time.sleep(2)
    answers(server, "acme-0")  # evicted by now
    for path in state.glob(f"s3lora-*/*/{WEIGHTS}"):
        with path.open("r+b") as file:
            file.seek(-100, 2)
            file.write(b"\x7f" * 100)
    answers(server, "globex-1")


@needs_prometheus
@pytest.mark.serving
@pytest.mark.slow
@pytest.mark.parametrize(("panel", "expression"), QUERIES, ids=NAMES)
def test_each_query_shows_something_of_a_real_guarded_vllm(watched, panel, expression):
    for variable, value in {
        "$job": JOB, "$instance": ".+", "$__rate_interval": "20s", "$__range": "5m"
    }.items():  # fmt: skip
        expression = expression.replace(variable, value)
    assert "$" not in expression
    may_be_zero = panel["title"] == "Failures" or "s3lora_planner" in expression
    least = 0 if may_be_zero else math.ulp(0)

    def shown():
        found = watched.series(expression, time.time() - 90)
        values = [value for one in found for value in one["values"]]
        return any(math.isfinite(value) and value >= least for value in values)

    watched.until(shown)  # the last requests are scraped and evaluated within seconds


@needs_prometheus
@pytest.mark.serving
@pytest.mark.slow
def test_the_metrics_of_the_dashboard_count_what_happened(watched):
    matrix = watched.get(
        "query", query="sum by (layer, projection) (s3lora_modules_stripped_total) > 0"
    )["result"]
    places = {(one["metric"]["layer"], one["metric"]["projection"]) for one in matrix}
    assert places
    assert all(layer.isdigit() for layer, _ in places)
    assert watched.value('s3lora_admissions_total{decision="rejected",mode="enforce"}') == 3
    assert watched.value('s3lora_admissions_total{decision="stripped",mode="enforce"}') == 12
    assert watched.value('s3lora_reloads_total{source="store"}') > 0


@needs_prometheus
@pytest.mark.serving
@pytest.mark.slow
def test_each_recording_rule_and_alert_is_evaluated_on_what_a_real_vllm_exposes(watched):
    found = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    written = [rule for group in yaml.safe_load(RULES.read_text())["groups"]
               for rule in group["rules"]]  # fmt: skip
    assert len(found) == len(written)
    assert {rule["health"] for rule in found} == {"ok"}
    # The fixture damaged a stored copy.
    watched.until(lambda: firing(watched) == {"S3LoRAQuarantine", "S3LoRAScoringFailures"})
    for rule in written:
        if "record" in rule:
            assert watched.value(rule["record"]) is not None, rule["record"]


def firing(prometheus):
    found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    return {rule["name"] for rule in found if rule.get("state") == "firing"}
