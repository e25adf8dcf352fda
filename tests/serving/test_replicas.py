"""Data-parallel engines behind one API server, and several API servers with one engine."""

import json
import os
import re
from dataclasses import replace

import pytest

from tests.serving.conftest import TOP_K, answers
from tests.support.adapters import copy_with
from tests.support.server import OPEN_LOADING, TWO_RANKS, Server

pytestmark = [pytest.mark.serving, pytest.mark.slow]

# Workers of the second engine cannot read the store while a certain file exists.
FAULTS = """
import multiprocessing, os
from s3lora_serve.store import stored_copy

opened = stored_copy.open_stored_copy

def open_stored_copy(path):
    parent = multiprocessing.parent_process()
    if parent and parent.name.endswith("DP1") and os.path.exists(os.environ["ENGINE_1_FAILS"]):
        raise MemoryError("no room in this engine")
    return opened(path)

stored_copy.open_stored_copy = open_stored_copy
"""


@pytest.fixture(scope="module")
def failing(workplace):
    return workplace / "engine-1-fails"


@pytest.fixture(scope="module")
def engines(model, policy_file, workplace, failing):
    """One API server, two engines of one worker each."""
    site = workplace / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAULTS)
    environment = OPEN_LOADING | TWO_RANKS | {
        "S3LORA_POLICY": str(policy_file),
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
        "ENGINE_1_FAILS": str(failing),
    }  # fmt: skip
    arguments = ("--data-parallel-size", "2")
    with Server(model, workplace / "engines.log", arguments, environment) as server:
        yield server


def per_engine(server):
    """The server with a header that selects the engine, for each engine."""
    return [replace(server, headers={"X-data-parallel-rank": number}) for number in "01"]


def alike(found, expected):
    return all(
        place == pytest.approx(other, abs=1e-4)
        for ours, theirs in zip(found, expected, strict=True)
        for place, other in zip(ours, theirs, strict=True)
    )


def test_every_engine_serves_the_stripped_adapter(engines, expected, spiked):
    before = engines.metrics()
    assert engines.load("acme", spiked).headers["X-S3LoRA-Decision"] == "stripped"
    for engine in per_engine(engines):
        assert alike(answers(engine, "acme"), expected["by-hand"])
        assert alike(answers(engine, "base"), expected["base"])
    after = engines.metrics()
    admissions = 's3lora_admissions_total{decision="stripped",mode="enforce"}'
    assert after[admissions] - before[admissions] == 1
    active = [v for k, v in after.items() if k.startswith("s3lora_gate_active")]
    assert active == [1, 1]
    assert engines.get("/s3lora/status").json() == {"guarded": True}
    adapter = engines.get("/s3lora/adapters/acme").json()
    assert sum(module["stripped"] for module in adapter["modules"]) == TOP_K
    rechecked = engines.post("/s3lora/recheck").json()["adapters"]
    assert {one["name"]: one["differs"] for one in rechecked}["acme"] is False


def test_what_one_engine_alone_cannot_load_is_served_by_none(
    engines, expected, trained, spiked, failing, tmp_path
):
    failing.touch()
    folder = copy_with(trained, tmp_path / "unlucky")
    refused = engines.load("unlucky", folder)
    failing.unlink()
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("S3LORA-401: ")
    names = [one["id"] for one in engines.get("/v1/models").json()["data"]]
    assert "unlucky" not in names
    assert engines.load("lucky", folder).status_code == 200
    for engine in per_engine(engines):
        assert alike(answers(engine, "lucky"), expected["trained by-hand"])


@pytest.fixture(scope="module")
def servers(model, spiked, policy_file, workplace):
    """Two API server processes on one port, one engine; vLLM disables run-time loading then."""
    environment = {
        "S3LORA_POLICY": str(policy_file),
        "S3LORA_AUDIT_LOG": str(workplace / "servers-audit.jsonl"),
    }
    arguments = ("--api-server-count", "2", "--lora-modules", f"static={spiked}")
    program = ("-m", "tests.support.many_servers")
    with Server(
        model, workplace / "servers.log", arguments, environment, program=program
    ) as server:
        yield server


def test_each_api_server_lists_the_static_adapter_and_it_counts_once(servers, expected, workplace):
    for _ in range(20):  # either process may accept the connection
        assert servers.get("/s3lora/status").json() == {"guarded": True}
        [adapter] = servers.get("/s3lora/adapters").json()["adapters"]
        assert (adapter["name"], adapter["decision"]) == ("static", "stripped")
    assert answers(servers, "static") == expected["by-hand"]
    assert {"0", "1"} <= set(re.findall(r"\(ApiServer_(\d) pid=", servers.log.read_text()))
    metrics = servers.metrics()
    assert metrics['s3lora_admissions_total{decision="stripped",mode="enforce"}'] == 1
    assert metrics['s3lora_adapter_modules_stripped{adapter_name="static"}'] == TOP_K
    lines = (workplace / "servers-audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["door"] for line in lines] == ["static"]
