"""The metrics stay bounded for any number of adapters with any names, and of policies."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.policy.method import Strip
from s3lora_serve.telemetry.metrics import Metrics
from s3lora_serve.telemetry.per_adapter_gauge import MAX_NAMES, OTHER

ADAPTERS = 10_000
HOSTILE = [
    'a"} 1\ns3lora_gate_active 0\n#', "\\", "\\n", "{}", "𝕏" * 300, "x" * 100_000, "", " ", OTHER,
    "\x00", "\x7f", "\u2028", "é", "../../etc", "%s", "</text>", "le", "__name__",
]  # fmt: skip
GAUGE = "s3lora_adapter_modules_stripped"


@pytest.fixture(scope="module")
def verdict(trained):
    return scan_adapter(trained, Policy(strip=Strip(top_k=2)))


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    made = Metrics(registry)
    made.set_model_modules({(str(i), "q_proj") for i in range(4)})
    made.activate("sha256:0", "enforce", "1")
    return made


def names(count):
    return HOSTILE + [f"tenant-{i}/ädapter\n{i}" for i in range(count - len(HOSTILE))]


def exposed(registry):
    """Every sample as a scraper reads it, and the exposed text."""
    text = generate_latest(registry).decode()
    return samples(text), text


def samples(text):
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def test_ten_thousand_hostile_names_are_two_hundred_series_and_one(registry, metrics, verdict):
    before, _ = exposed(registry)
    for name in names(ADAPTERS):
        metrics.record(replace(verdict, name=name, path=name), "cpu")
        metrics.serve(replace(verdict, name=name))
    after, text = exposed(registry)
    gauge = {s.labels["adapter_name"]: s.value for s in after if s.name == GAUGE}
    assert len(gauge) == MAX_NAMES + 1
    assert len(after) - len(before) == len(gauge)
    assert sum(gauge.values()) == 2 * ADAPTERS
    assert gauge[OTHER] == 2 * (ADAPTERS - MAX_NAMES)
    assert max(map(len, text.splitlines())) < 1500
    assert [s.value for s in after if s.name == "s3lora_gate_active"] == [1]


def test_names_keep_their_series_when_withdrawn_and_served_again(registry, metrics, verdict):
    served = names(MAX_NAMES + 50)
    for name in served:
        metrics.serve(replace(verdict, name=name))
    for name in served:
        metrics.withdraw(name)
    metrics.serve(replace(verdict, name="latecomer"))
    metrics.serve(replace(verdict, name=served[-60]))
    found, _ = exposed(registry)
    gauge = {s.labels["adapter_name"]: s.value for s in found if s.name == GAUGE and s.value}
    assert gauge == {OTHER: 2.0, served[-60]: 2.0}


def test_modules_with_names_of_the_owners_choice_make_no_series(registry, metrics, verdict):
    before, _ = exposed(registry)
    for i, name in enumerate(names(2000)):
        module = replace(verdict.modules[0], name=name, projection=name, layer=i + 100)
        metrics.record(replace(verdict, modules=(module,)), "cpu")
    after, _ = exposed(registry)
    assert len(after) == len(before)
    scored = {s.labels["projection"]: s.value for s in after
              if s.name == "s3lora_modules_scored_total"}  # fmt: skip
    assert scored[OTHER] == 2000


def test_of_a_thousand_policies_only_the_one_in_force_has_a_series(registry, metrics):
    before, _ = exposed(registry)
    for i in range(1000):
        metrics.activate(f"sha256:{i}", "enforce", "1")
    after, _ = exposed(registry)
    assert len(after) == len(before)
    [policy] = [sample for sample in after if sample.name == "s3lora_policy_info"]
    assert (policy.labels["policy_digest"], policy.value) == ("sha256:999", 1)


WORKERS_AND_SERVER = """
import os
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from s3lora_serve.telemetry.metrics import Metrics
from s3lora_serve.telemetry.policy_gauge import leave_out_former_policies

for policies in (["a", "b", "c"], ["a", "b"]):  # the second worker is behind
    if not (worker := os.fork()):
        metrics = Metrics(CollectorRegistry())
        for policy in policies:
            metrics.activate(policy, "enforce", "1")
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
leave_out_former_policies()
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_workers_in_processes_of_their_own_expose_each_policy_that_one_of_them_has(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WORKERS_AND_SERVER],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    policies = {
        sample.labels["policy_digest"]: sample.value
        for sample in samples(done.stdout)
        if sample.name == "s3lora_policy_info"
    }
    assert policies == {"b": 1, "c": 1}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_prometheus_reads_what_hostile_names_are_exposed_as(registry, metrics, verdict):
    for name in names(300):
        metrics.serve(replace(verdict, name=name))
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
