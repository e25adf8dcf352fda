"""Alignment scorers on a real engine: each serves as an adapter made by hand does on stock vLLM."""

import json
import shutil

import pytest

from s3lora_serve import scan_adapter
from s3lora_serve.alignment.reference_file import read_reference
from s3lora_serve.policy.file import read_policy
from s3lora_serve.policy.file_digests import with_file_digests
from tests.serving.conftest import answers, evicting_server, log_of_failed_start
from tests.support.adapters import copy_with, key, without
from tests.support.references import reference_for_model
from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving

NAMES = ("safe-lora", "splora", "projected")

POLICY = """
scorer: {{name: safe-lora, reference: {reference}}}
strip: {{top_k: 6}}
rules:
  - {{match: {{adapter: splora}}, scorer: {{name: splora}}}}
  - {{match: {{adapter: projected}}, action: project}}
"""


@pytest.fixture(scope="module")
def reference(model, workplace):
    folder = workplace / "alignment"
    folder.mkdir()
    return reference_for_model(model, folder, rank=16)


@pytest.fixture(scope="module")
def policy_file(reference, workplace):
    file = workplace / "alignment.yaml"
    file.write_text(POLICY.format(reference=reference))
    return file


@pytest.fixture(scope="module")
def server(model, policy_file, workplace):
    with evicting_server(model, workplace, "alignment", policy_file) as server:
        yield server


@pytest.fixture(scope="module")
def loaded(server, trained):
    """The server's answers to the registration of the adapter under each name."""
    return {name: server.load(name, trained) for name in NAMES}


def _verdict(trained, policy_file, name):
    policy = with_file_digests(read_policy(policy_file)).for_adapter(name, "", None)
    return scan_adapter(trained, policy.model_copy(update={"rules": ()}))


@pytest.fixture(scope="module")
def by_hand(trained, policy_file, reference, stock, workplace):
    """Log-probabilities on stock vLLM of adapters written without the gate's code."""
    spaces = read_reference(reference).subspaces
    found = {}
    for name in NAMES:
        verdict = _verdict(trained, policy_file, name)

        def project(tensors, names=verdict.projected):
            for module in names:
                space, B = spaces[module], tensors[key(module, "B")]
                U = space.U.double()
                C = (U * space.singular_values.square()) @ U.T / space.frobenius
                tensors[key(module, "B")] = (C @ B.double()).to(B.dtype)

        change = project if verdict.projected else without(set(verdict.stripped))
        folder = copy_with(trained, workplace / f"{name} by hand", change)
        assert stock.load(f"{name}-by-hand", folder).status_code == 200
        found[name] = answers(stock, f"{name}-by-hand")
    assert stock.load("alignment-whole", trained).status_code == 200
    found["whole"] = answers(stock, "alignment-whole")
    return found


def test_each_scorer_and_action_serves_what_was_made_by_hand(server, loaded, by_hand):
    for name in NAMES:
        assert loaded[name].status_code == 200
        assert loaded[name].headers["X-S3LoRA-Decision"] == "stripped"
        assert answers(server, name) == by_hand[name]
        assert by_hand[name] != by_hand["whole"]
    assert answers(server, NAMES[0]) == by_hand[NAMES[0]]  # evicted meanwhile, and loaded again


def test_verdict_metrics_and_audit_say_what_was_projected(server, loaded, workplace):
    assert loaded["projected"].status_code == 200
    verdict = server.get("/s3lora/adapters/projected").json()
    projected = [module["name"] for module in verdict["modules"] if module["projected"]]
    assert len(projected) == 6
    assert verdict["served_digest"] != verdict["digest"]
    lines = (workplace / "alignment-audit.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    entry = next(entry for entry in entries if entry["adapter"] == "projected")  # then re-loads
    assert entry["projected"] == projected
    assert entry["stripped"] == []
    metrics = server.metrics()
    counted = sum(v for name, v in metrics.items() if "s3lora_modules_projected_total" in name)
    assert counted == 6
    assert any("s3lora_module_alignment_bucket" in name for name in metrics)
    page = server.get("/s3lora/?adapter=projected").text
    assert "Projected" in page
    assert "% of what alignment changed" in page


def test_recheck_finds_nothing_to_change_and_rejects_nothing(server, loaded):
    assert loaded["projected"].status_code == 200
    checked = server.post("/s3lora/recheck").json()
    assert [each["name"] for each in checked["adapters"] if each["differs"]] == []


@pytest.mark.slow
def test_server_does_not_start_with_a_reference_that_was_made_for_another_model(
    model, reference, workplace, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"scorer: {{name: safe-lora, reference: {reference}}}\n")
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy)}
    said = log_of_failed_start(Server(other, tmp_path / "log", (), environment))
    assert "scorer.reference was made for a model with config" in said
