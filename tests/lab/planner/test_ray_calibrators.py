"""Calibrations on a real Ray cluster of two nodes: one base for each worker, several adapters."""

import os
import time

import pytest

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
from s3lora_serve.lab.planner.calibrator import CalibrationInputs, CalibrationTask
from s3lora_serve.plans.file import plan_of
from s3lora_serve.policy.limits import Limits
from tests.support.adapters import WEIGHTS, copy_with, key

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra ray")
pytestmark = pytest.mark.slow  # half a minute of Ray
CORES = 2
"""Of one worker: `CORES` in lab/planner/ray_calibrators.py."""


@pytest.fixture
def cluster():
    """Two nodes with the cores of one worker each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": CORES})
    cluster.add_node(num_cpus=CORES)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def calibrators(cluster, chat):
    files = tuple(read_probes(getattr(chat, kind), kind) for kind in ("harmful", "benign"))
    options = CalibrationOptions(max_asr=0.2)
    inputs = CalibrationInputs(chat.base, files, options, dtype="float32")
    from s3lora_serve.lab.planner import ray_calibrators

    assert ray_calibrators.CORES == CORES
    found = ray_calibrators.RayCalibrators(inputs, cluster.address)
    yield found
    found.close()


def task(folder, tmp_path):
    digest = copy_adapter(folder, Limits()).digest
    return CalibrationTask(digest, str(folder), str(tmp_path / f"{folder.name}.search"))


def test_two_workers_calibrate_at_the_same_time_and_a_broken_adapter_stops_none(
    calibrators, chat, tmp_path
):
    def other(tensors):
        tensors[key("model.layers.0.self_attn.q_proj", "A")][0, 0] += 1e-6

    second = copy_with(chat.adapter, tmp_path / "second", other)
    broken = copy_with(chat.adapter, tmp_path / "broken")
    tasks = [task(each, tmp_path) for each in (chat.adapter, broken, second)]
    (broken / WEIGHTS).write_bytes(b"nothing")
    assert calibrators.free() == 2
    futures = [calibrators.submit(tasks[0]), calibrators.submit(tasks[1])]
    assert calibrators.free() == 0
    deadline = time.monotonic() + 120
    while not calibrators.free():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    futures.append(calibrators.submit(tasks[2]))
    first, failed, third = (future.result(120) for future in futures)
    assert failed.reason is not None
    assert failed.may_pass  # its folder holds other weights than were asked for
    for end, own in ((first, tasks[0]), (third, tasks[2])):
        assert end.reason is None
        assert plan_of(end.plan.encode(), "plan").adapter_digest == own.digest
