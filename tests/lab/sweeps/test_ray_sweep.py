"""`s3lora scan --ray` on a real Ray cluster of several nodes, with a worker and a node killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s3lora_serve import Policy
from s3lora_serve.cli import app
from s3lora_serve.lab.sweeps.sweep import sweep
from s3lora_serve.policy.method import Strip
from tests.support.adapters import WEIGHTS, copy_with

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra ray")

ADAPTERS = 200
POLICY = Policy(strip=Strip(top_k=2))


@pytest.fixture
def cluster():
    """A head and one more node, each with one core and its own processes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def hub(trained, tmp_path_factory) -> Path:
    """ADAPTERS adapters; one is broken."""
    root = tmp_path_factory.mktemp("hub")
    for i in range(ADAPTERS):
        copy_with(trained, root / f"a{i:03}")
    (root / "a150" / WEIGHTS).write_bytes(b"nothing")
    return root


def scan(hub, address, output) -> subprocess.Popen:
    policy = hub.parent / "policy.yaml"
    policy.write_text("strip: {top_k: 2}\n")
    command = [sys.executable, "-m", "s3lora_serve", "scan", hub, "--ray", address,
               "--policy", policy, "--format", "jsonl", "-o", output]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def workers() -> list[int]:
    """Process ids of Ray workers that are scoring."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::scan_on_one"):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def count_verdicts(output: Path) -> int:
    return len(output.read_bytes().splitlines()) if output.exists() else 0


@pytest.mark.slow  # half a minute of Ray noticing that a node is gone
def test_no_adapter_is_lost_or_counted_twice_when_a_worker_and_a_node_die(cluster, hub, tmp_path):
    output = tmp_path / "verdicts.jsonl"
    failing_node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    run = scan(hub, cluster.address, output)
    wait_for(lambda: count_verdicts(output) >= 3)
    [worker, *_] = wait_for(workers)
    os.kill(worker, signal.SIGKILL)
    cluster.remove_node(failing_node, allow_graceful=False)
    written_at_kill = count_verdicts(output)
    assert run.wait(300) == 1, run.stderr.read()
    assert written_at_kill < ADAPTERS, "the sweep ended before the worker and the node died"

    def comparable(verdicts):
        return [{k: v for k, v in verdict.items() if k != "seconds"} for verdict in verdicts]

    here = [v.as_json() for v in sweep(sorted(hub.iterdir()), POLICY)]
    assert comparable(map(json.loads, output.read_text().splitlines())) == comparable(here)


def test_without_a_cluster_the_command_says_so(trained):
    done = CliRunner().invoke(app, ["scan", str(trained), "--ray", "auto"])
    assert done.exit_code == 2
    assert "--ray auto: Could not find any running Ray instance" in done.stderr


def test_processes_of_this_machine_and_a_cluster_are_not_mixed(trained):
    done = CliRunner().invoke(app, ["scan", str(trained), "--ray", "auto", "--jobs", "2"])
    assert done.exit_code == 2
    assert "leave --jobs out" in done.stderr
