"""The engine's own loop reloads evicted adapters as admitted, and no failure ends it."""

import json
import shutil
from pathlib import Path

import pytest

from s3lora_serve import scan_adapter
from tests.serving.conftest import answers
from tests.support.adapters import CONFIG, WEIGHTS, copy_with
from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def state(workplace) -> Path:
    return workplace / "state"


@pytest.fixture(scope="module")
def small(model, policy_file, workplace, state):
    """A guarded server with room for two adapters: a third evicts the oldest."""
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy_file),
        "S3LORA_STATE_DIR": str(state),
        "S3LORA_AUDIT_LOG": str(workplace / "small-audit.jsonl"),
    }
    arguments = ("--max-cpu-loras", "2", "--max-loras", "1", "--api-key", "the key")
    with Server(model, workplace / "small.log", arguments, environment, key="the key") as server:
        yield server


def evict_others(server, adapter, tmp_path):
    """Load two more adapters, so that the engine evicts the earlier ones."""
    for i in range(2):
        name = f"filler-{i}-{tmp_path.name}"
        assert server.load(name, adapter).status_code == 200
        assert answers(server, name)


def stored_folders(state) -> list[Path]:
    return [path for path in state.glob("s3lora-*/*") if (path / WEIGHTS).is_file()]


@pytest.mark.parametrize("change", ["deleted", "edited", "truncated", "replaced"])
def test_an_evicted_adapter_is_reloaded_as_admitted_after_its_folder_changed(
    small, expected, spiked, trained, tmp_path, change
):
    folder = copy_with(spiked, tmp_path / "tenant")
    assert small.load(change, folder).status_code == 200
    weights = folder / WEIGHTS
    if change == "deleted":
        shutil.rmtree(folder)
    elif change == "edited":
        data = bytearray(weights.read_bytes())
        data[-4000:] = b"\x7f" * 4000
        weights.write_bytes(data)
    elif change == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        shutil.copy(trained / WEIGHTS, weights)
    evict_others(small, trained, tmp_path)
    assert answers(small, change) == expected["by-hand"]


def test_registrants_of_equal_content_are_audited_with_their_own_paths_when_loaded_again(
    small, spiked, trained, tmp_path, workplace
):
    folders = {name: copy_with(spiked, tmp_path / name) for name in ("acme-twin", "initech-twin")}
    for name, folder in folders.items():
        assert small.load(name, folder).status_code == 200
    evict_others(small, trained, tmp_path)
    for name in folders:
        assert answers(small, name)
    log = (workplace / "small-audit.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    again = {line["adapter"]: line for line in lines if line["door"] == "reload"}
    assert {name: again[name]["path"] for name in folders} == {
        name: str(folder) for name, folder in folders.items()
    }


def test_an_adapter_that_cannot_be_loaded_again_is_quarantined_and_the_engine_continues(
    small, expected, spiked, trained, tmp_path, state, workplace
):
    before = set(stored_folders(state))
    folder = copy_with(spiked, tmp_path / "tenant", r_unused=1)
    assert small.load("damaged", folder).status_code == 200
    [ours] = set(stored_folders(state)) - before
    with (ours / WEIGHTS).open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x7f" * 100)
    metric = 's3lora_quarantined_total{reason="S3LORA-403"}'
    quarantined = small.metrics()[metric]
    evict_others(small, trained, tmp_path)
    assert answers(small, "damaged") == expected["base"]
    assert small.get("/health").status_code == 200
    assert small.metrics()[metric] == quarantined + 1
    assert "'damaged' is quarantined" in small.log.read_text()
    [line] = [
        line
        for line in map(json.loads, (workplace / "small-audit.jsonl").read_text().splitlines())
        if line["door"] == "quarantine" and line["adapter"] == "damaged"
    ]
    assert line["path"] == str(folder)
    # After a new registration it is served as admitted.
    assert small.unload("damaged").status_code == 200
    assert small.load("damaged", folder).status_code == 200
    assert answers(small, "damaged") == expected["by-hand"]


def test_an_adapter_with_a_key_for_each_of_1000_experts_is_served_as_it_was_scored(
    small, expected, spiked, tmp_path
):
    alpha = json.loads((spiked / CONFIG).read_text())["lora_alpha"]
    names = [module.name for module in scan_adapter(spiked).modules]
    names += [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(1000)]
    # Without these keys the scaling of every module would be three times as large.
    changes = {"lora_alpha": 3 * alpha, "alpha_pattern": dict.fromkeys(names, alpha)}
    folder = copy_with(spiked, tmp_path / "experts", **changes)
    assert small.load("experts", folder).status_code == 200
    assert answers(small, "experts") == expected["by-hand"]


def test_an_adapter_is_read_once_when_it_is_replaced_in_place(small, expected, spiked, tmp_path):
    folder = copy_with(spiked, tmp_path / "tenant")
    assert small.load("in-place", folder).status_code == 200
    assert small.load("in-place", folder, load_inplace=True).status_code == 200
    before = small.metrics()['s3lora_admissions_total{decision="stripped",mode="enforce"}']
    shutil.rmtree(folder)
    assert answers(small, "in-place") == expected["by-hand"]
    after = small.metrics()['s3lora_admissions_total{decision="stripped",mode="enforce"}']
    assert before == after


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/adapters"), ("DELETE", "/adapters/in-place")]
)
def test_the_sagemaker_route_requires_the_api_key_too(small, spiked, method, path):
    body = {"name": "keyless", "src": str(spiked)}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic dGhlIGtleQ=="}):
        response = small.request(method, path, json=body, headers=headers)
        assert response.status_code == 401
    served = {entry["id"] for entry in small.get("/v1/models").json()["data"]}
    assert "keyless" not in served


def test_the_sagemaker_route_serves_and_refuses_with_the_key(small, expected, spiked, tmp_path):
    accepted = small.request("POST", "/adapters", json={"name": "keyed", "src": str(spiked)})
    assert accepted.status_code == 200
    assert answers(small, "keyed") == expected["by-hand"]
    bad = copy_with(spiked, tmp_path / "bad", peft_type="IA3")
    refused = small.request("POST", "/adapters", json={"name": "refused", "src": str(bad)})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "AdapterRejected"
    assert error["message"].startswith("S3LORA-103: ")
    assert small.request("DELETE", "/adapters/keyed").status_code == 200


def test_the_status_probe_needs_no_key(small):
    response = small.request("GET", "/s3lora/status", headers={})
    assert (response.status_code, response.json()) == (200, {"guarded": True})
