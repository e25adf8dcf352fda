"""Policy options that need a real engine to test: unscorable weights, deadline, audit, owners."""

import hashlib
import json
import shutil

import pytest

from tests.serving.conftest import answers
from tests.support.adapters import copy_with, train_adapter
from tests.support.meeting import base_answers_alone_and_batched
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import PROJECTIONS

pytestmark = pytest.mark.serving

POLICY = """
strip: {{top_k: 0}}
audit: {{required: true}}
owners:
  - {{names: "owned/*", paths: ["{folder}/owned/**"], keys: ["{key}"]}}
rules:
  - {{match: {{adapter: "slow*"}}, limits: {{seconds: 0.000001}}}}
  - {{match: {{adapter: "admit*", path: "{folder}/**"}}, on_unscorable: admit}}
  - {{match: {{adapter: "strip*", path: "{folder}/**"}}, on_unscorable: strip}}
"""
KEY, OTHER_KEY = "the owner's key", "another tenant's key"


@pytest.fixture(scope="module")
def embedding(model, workplace):
    targets = [*PROJECTIONS, "embed_tokens"]
    return train_adapter(model, workplace / "embedding", target_modules=targets)


@pytest.fixture(scope="module")
def linear_only(embedding, workplace):
    """The same adapter written without its embedding tensors."""

    def drop(tensors):
        for name in [name for name in tensors if "embed" in name]:
            del tensors[name]

    return copy_with(embedding, workplace / "linear-only", drop)


@pytest.fixture(scope="module")
def served(stock, embedding, linear_only):
    folders = {"whole": embedding, "linear": linear_only}
    for name, folder in folders.items():
        assert stock.load(f"embedding {name}", folder).status_code == 200
    return {name: answers(stock, f"embedding {name}") for name in folders}


@pytest.fixture(scope="module")
def unscorable(model, workplace):
    policy = workplace / "unscorable.yaml"
    key = hashlib.sha256(KEY.encode()).hexdigest()[:16]
    policy.write_text(POLICY.format(folder=workplace.resolve(), key=key))
    log = workplace / "unscorable" / "audit.jsonl"
    log.parent.mkdir()
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy), "S3LORA_AUDIT_LOG": str(log)}
    keys = ("--api-key", KEY, OTHER_KEY)
    with Server(model, workplace / "unscorable.log", keys, environment, key=KEY) as server:
        yield server


def test_an_embedding_lora_is_refused_admitted_or_removed(unscorable, served, embedding):
    assert served["whole"] != served["linear"]
    refused = unscorable.load("plain", embedding)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("S3LORA-110: ")
    for name, expected in (("admit-it", "whole"), ("strip-it", "linear")):
        assert unscorable.load(name, embedding).status_code == 200
        assert answers(unscorable, name) == served[expected]


def test_stock_vllm_lets_an_embedding_lora_act_on_base_requests(stock, embedding):
    """A defect of vLLM on CPU; without it the next test would prove nothing."""
    alone, beside = base_answers_alone_and_batched(stock, (embedding, embedding), "embedded")
    assert beside - {alone}


def test_base_requests_beside_admitted_embeddings_answer_as_the_base(unscorable, embedding):
    alone, beside = base_answers_alone_and_batched(unscorable, (embedding, embedding), "admit")
    assert beside == {alone}


def test_an_adapter_that_cannot_be_scored_in_time_is_refused(unscorable, trained):
    response = unscorable.load("slow", trained)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("S3LORA-402: ")
    assert unscorable.metrics()['s3lora_failures_total{reason="deadline"}'] >= 1


def test_nothing_is_admitted_that_cannot_be_audited(unscorable, trained, workplace):
    folder = workplace / "unscorable"
    before = unscorable.metrics()['s3lora_failures_total{reason="audit"}']
    shutil.rmtree(folder)
    response = unscorable.load("unwritten", trained)
    folder.mkdir()
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("S3LORA-404: ")
    assert unscorable.metrics()['s3lora_failures_total{reason="audit"}'] == before + 1
    assert unscorable.load("written", trained).status_code == 200
    assert '"written"' in (folder / "audit.jsonl").read_text()


def test_repeated_refusals_are_one_line_and_a_count_when_the_server_ends(unscorable, tmp_path):
    log = unscorable.log.parent / "unscorable" / "audit.jsonl"
    empty = tmp_path / "empty"
    empty.mkdir()
    for number in range(20):
        assert unscorable.load(f"burst-{number}", empty).status_code == 400

    def burst():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        named = [line for line in lines if line["adapter"].startswith("burst-")]
        return [(line["adapter"], line["reason"], line["count"]) for line in named]

    assert burst() == [("burst-0", "S3LORA-101", 1)]
    unscorable.stop()
    assert burst()[1:] == [("burst-19", "S3LORA-101", 19)]
    unscorable.start()
    unscorable.wait()


def test_owned_name_is_loaded_replaced_and_unloaded_by_its_owner_alone(
    unscorable, trained, workplace
):
    other = {"Authorization": f"Bearer {OTHER_KEY}"}

    def ask(route, headers=None, **body):
        more = {"headers": headers} if headers else {}
        response = unscorable.request("POST", route, json=body, **more)
        if response.status_code != 200:
            assert response.status_code == 400
            assert response.json()["error"]["message"].startswith("S3LORA-222: ")
        return response.status_code == 200

    owned = copy_with(trained, workplace / "owned" / "a")
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    own = {"lora_name": "owned/a", "lora_path": str(owned)}
    foreign = own | {"lora_path": str(trained)}
    assert not ask(load, **foreign)  # from elsewhere
    assert not ask(load, other, **own)  # by another key
    assert not ask("/adapters", other, name="owned/a", src=str(owned))
    assert ask(load, **own)
    before = answers(unscorable, "owned/a")
    assert not ask(load, **foreign, load_inplace=True)
    assert not ask(load, other, **own, load_inplace=True)
    assert not ask(unload, other, lora_name="owned/a")
    deleted = unscorable.request("DELETE", "/adapters/owned/a", headers=other)
    assert deleted.status_code in (400, 404)
    assert answers(unscorable, "owned/a") == before
    assert ask(unload, lora_name="owned/a")
    assert ask(load, other, lora_name="anybody", lora_path=str(trained))
    assert ask(unload, other, lora_name="anybody")
