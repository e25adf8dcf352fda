"""A new registration under a served name replaces the adapter completely and at once: in the
engine, the prefix cache, running requests, metrics and the store."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from tests.serving.conftest import PROMPTS, answers
from tests.support.adapters import WEIGHTS, copy_with, diverged, key
from tests.support.meeting import (
    base_answers_alone_and_batched,
    long_answer,
    retry_until_concurrent,
    start_long_answer,
)
from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving

LONG = " ".join(PROMPTS * 6)
"""More than one block of the prefix cache."""


@pytest.fixture(scope="module")
def state(workplace) -> Path:
    return workplace / "replacement-state"


@pytest.fixture(scope="module")
def changing_policy(workplace) -> Path:
    file = workplace / "replacement-policy.yaml"
    file.write_text("strip: {top_k: 3}\n...\n")
    return file


@pytest.fixture(scope="module")
def gate(model, changing_policy, state, workplace):
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(changing_policy),
        "S3LORA_STATE_DIR": str(state),
        "VLLM_SERVER_DEV_MODE": "1",  # POST /collective_rpc lists the engine's adapters
    }
    arguments = ("--max-cpu-loras", "4", "--max-loras", "2")
    with Server(model, workplace / "replacement.log", arguments, environment) as server:
        yield server


@pytest.fixture
def policy(gate, changing_policy, spiked):
    """The server's policy file, which a test may change; afterwards the old one is in force."""
    text = changing_policy.read_text()
    yield changing_policy
    changing_policy.write_text(text)
    gate.post("/s3lora/scan", lora_name="any", lora_path=str(spiked)).raise_for_status()


def first_token(server, name):
    """The likeliest first tokens after a long prompt, possibly from the prefix cache."""
    body = {"model": name, "prompt": LONG, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    answer = server.post("/v1/completions", **body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]


def alike(ours, theirs):
    return ours == pytest.approx(theirs, abs=1e-4)


def stored_names(state):
    return {p.parent.name for p in state.glob(f"s3lora-*/*/{WEIGHTS}") if len(p.parent.name) >= 64}


def pinned(state):
    return {pin.name.removeprefix("pin-") for pin in state.glob("s3lora-*/process-*/pin-*")}


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return holds


def engine_ids(server):
    """The ids of the adapters in the engine, active or not."""
    [answer] = server.post("/collective_rpc", method="list_loras").json()["results"]
    return set(answer)


def test_stock_vllm_answers_from_blocks_of_the_replaced_weights(stock, spiked, trained, tmp_path):
    """The defect that the next test checks for; shows that the next test can detect it."""
    fresh = copy_with(trained, tmp_path / "fresh")
    assert stock.load("fresh", fresh).status_code == 200
    of_new_content = first_token(stock, "fresh")
    folder = copy_with(spiked, tmp_path / "tenant")
    assert stock.load("tenant", folder).status_code == 200
    first_token(stock, "tenant")
    shutil.copy(trained / WEIGHTS, folder / WEIGHTS)
    assert stock.load("tenant", folder, load_inplace=True).status_code == 200
    assert not alike(first_token(stock, "tenant"), of_new_content)


def test_replaced_content_is_answered_from_no_block_of_the_old(gate, spiked, trained, tmp_path):
    folder = copy_with(spiked, tmp_path / "tenant")
    fresh = copy_with(trained, tmp_path / "fresh")
    assert gate.load("fresh", fresh).status_code == 200
    assert gate.load("changing", folder).status_code == 200
    before, of_new_content = first_token(gate, "changing"), first_token(gate, "fresh")
    assert not alike(before, of_new_content)
    shutil.copy(trained / WEIGHTS, folder / WEIGHTS)
    assert gate.load("changing", folder, load_inplace=True).status_code == 200
    assert alike(first_token(gate, "changing"), of_new_content)
    # Loading under the same name after unloading is a new admission too.
    assert gate.unload("changing").status_code == 200
    shutil.copy(spiked / WEIGHTS, folder / WEIGHTS)
    assert gate.load("changing", folder).status_code == 200
    assert alike(first_token(gate, "changing"), before)


def test_a_changed_policy_applies_to_the_next_registration_which_uses_no_old_block(
    gate, policy, expected, spiked, tmp_path
):
    assert gate.load("by-policy", spiked).status_code == 200
    stripped = first_token(gate, "by-policy")
    try:
        policy.write_text("strip: {top_k: 0}\n...\n")
        assert answers(gate, "by-policy") == expected["by-hand"], "registered under the old policy"
        assert gate.load("by-policy", spiked, load_inplace=True).status_code == 200
        assert answers(gate, "by-policy") == expected["whole"]
        assert not alike(first_token(gate, "by-policy"), stripped)
        policies = [v for k, v in gate.metrics().items() if "policy_info" in k]
        assert policies == [1], "a series of the former policy"
    finally:
        gate.unload("by-policy")


def test_a_changed_policy_that_is_not_valid_is_reported_and_the_old_one_stays(
    gate, policy, expected, spiked
):
    metric = 's3lora_failures_total{reason="policy"}'
    assert gate.load("takes up the valid one", spiked).status_code == 200
    counted = gate.metrics()[metric]
    policy.write_text("strip: {top_k: many}\n...\n")
    assert gate.load("after-bad-policy", spiked).status_code == 200
    assert answers(gate, "after-bad-policy") == expected["by-hand"]
    assert gate.metrics()[metric] == counted + 1
    assert "stays in force: S3LORA-901" in gate.log.read_text()
    told = CliRunner().invoke(app, ["recheck", gate.url("")])
    assert told.exit_code == 1
    assert "the policy of before is in force: S3LORA-901" in told.output


def test_the_server_says_what_it_would_decide_and_registers_nothing(gate, spiked, tmp_path):
    def elsewhere(tensors):
        for side in "AB":
            tensor = tensors.pop(key("model.layers.3.self_attn.q_proj", side))
            tensors[key("model.layers.3.self_attn.x_proj", side)] = tensor

    cases = {
        "dry": spiked,
        "dry-nan": copy_with(spiked, tmp_path / "nan", diverged),
        "dry-elsewhere": copy_with(spiked, tmp_path / "elsewhere", elsewhere),
    }
    for name, folder in cases.items():
        before = gate.metrics()
        scanned = gate.post("/s3lora/scan", lora_name=name, lora_path=str(folder))
        assert scanned.status_code == 200
        assert gate.metrics() == before
        assert name not in {entry["id"] for entry in gate.get("/v1/models").json()["data"]}
        verdict = scanned.json()
        answer = gate.load(name, folder)
        assert (answer.status_code == 200) == (verdict["decision"] != "rejected")
        assert answer.headers["X-S3LoRA-Decision"] == verdict["decision"]
        if verdict["reason"]:
            assert answer.json()["error"]["message"].startswith(verdict["reason"]["code"])
        else:
            served = gate.get(f"/s3lora/adapters/{name}").json()
            assert served["modules"] == verdict["modules"]
    assert gate.post("/s3lora/scan", lora_name="x", lora_path="/nowhere").status_code == 404


def test_served_adapters_are_listed_a_page_at_a_time(gate, trained):
    for name in ("acme/one", "acme/two"):
        assert gate.load(name, trained).status_code == 200
    found = gate.get("/s3lora/adapters?limit=1000").json()
    served = {entry["id"] for entry in gate.get("/v1/models").json()["data"]} - {"base"}
    assert {adapter["name"] for adapter in found["adapters"]} == served
    assert found["total"] == len(served)
    last = gate.get(f"/s3lora/adapters?offset={found['total'] - 1}&limit=1").json()["adapters"]
    assert [adapter["name"] for adapter in last] == ["acme/two"]
    assert "spectrum" not in last[0]["modules"][0]
    one = gate.get("/s3lora/adapters/acme/one").json()
    assert (one["name"], len(one["modules"][0]["spectrum"])) == ("acme/one", 8)
    assert gate.get("/s3lora/adapters/nobody").status_code == 404
    policy = gate.get("/s3lora/policy").json()
    assert policy["policy"]["strip"] == {"top_k": 3}


def test_recheck_names_what_the_policy_in_force_would_decide_otherwise(
    gate, policy, spiked, trained, tmp_path
):
    def recheck():
        done = CliRunner().invoke(app, ["recheck", gate.url(""), "--format", "json"])
        found = json.loads(done.stdout)["adapters"]
        return done.exit_code, {each["name"] for each in found if each["differs"]}

    folder = copy_with(spiked, tmp_path / "gone")
    assert gate.load("rechecked", folder).status_code == 200
    shutil.rmtree(folder)
    text = policy.read_text()
    assert recheck() == (0, set())
    digest = gate.get("/s3lora/adapters/rechecked").json()["digest"]
    policy.write_text(f"deny: ['{digest}']\n{text}")
    code, names = recheck()
    assert code == 1
    assert "rechecked" in names
    assert "acme/one" not in names
    table = CliRunner().invoke(app, ["recheck", gate.url("")]).stdout
    assert "S3LORA-202" in table
    policy.write_text(text)
    assert recheck() == (0, set())


def test_stock_vllm_answers_base_requests_with_a_neighbours_weights(stock, spiked, trained):
    """A defect of vLLM on CPU; without it the next test would prove nothing."""
    alone, beside = base_answers_alone_and_batched(stock, (spiked, trained))
    assert beside - {alone}


def test_base_requests_beside_adapters_answer_as_the_base(gate, spiked, trained):
    alone, beside = base_answers_alone_and_batched(gate, (spiked, trained))
    assert beside == {alone}


def test_requests_under_way_end_with_the_adapter_they_began_with(gate, spiked, trained, tmp_path):
    for name, folder in (("calm-old", spiked), ("calm-new", trained)):
        assert gate.load(name, folder).status_code == 200
    old, new = long_answer(gate, "calm-old"), long_answer(gate, "calm-new")
    assert old != new

    def replaced_while_running():
        assert gate.load("busy", spiked).status_code == 200
        with ThreadPoolExecutor() as threads:
            first = start_long_answer(threads, gate, "busy")
            assert gate.load("busy", trained, load_inplace=True).status_code == 200
            second = start_long_answer(threads, gate, "busy")
            overlapped = not first.done()
            assert gate.unload("busy").status_code == 200
            assert gate.load("busy", spiked).status_code == 200
            third = start_long_answer(threads, gate, "busy")
            assert [first.result(), second.result(), third.result()] == [old, new, old]
        assert gate.unload("busy").status_code == 200
        return overlapped

    retry_until_concurrent(replaced_while_running)
    assert gate.get("/health").status_code == 200


def test_unloading_leaves_nothing_of_an_adapter_behind(gate, state, spiked, tmp_path):
    folder = copy_with(spiked, tmp_path / "tenant", r_unused=2)
    gauge = 's3lora_adapter_modules_stripped{adapter_name="leaving"}'
    before, engine = pinned(state), engine_ids(gate)
    assert gate.load("leaving", folder).status_code == 200
    assert gate.metrics()[gauge] == 3
    assert len(pinned(state) - before) == 1
    [number] = engine_ids(gate) - engine
    assert gate.unload("leaving").status_code == 200
    assert gate.metrics()[gauge] == 0
    assert until(lambda: pinned(state) <= before)
    assert number not in engine_ids(gate)
    assert gate.load("leaving", folder).status_code == 200, "a new admission"
    assert number not in engine_ids(gate)


def test_an_adapter_that_replaces_itself_is_not_activated_again(gate, state, spiked, tmp_path):
    folder = copy_with(spiked, tmp_path / "tenant", r_unused=3)
    assert gate.load("same", folder).status_code == 200
    ids, stored = engine_ids(gate), stored_names(state)
    assert gate.load("same", folder, load_inplace=True).status_code == 200
    assert engine_ids(gate) == ids
    assert stored_names(state) == stored


def test_a_quarantined_adapter_is_answered_from_no_block_from_before_its_quarantine(
    gate, state, spiked, trained, tmp_path
):
    before = stored_names(state)
    folder = copy_with(spiked, tmp_path / "tenant", r_unused=4)
    assert gate.load("fragile", folder).status_code == 200
    whole = first_token(gate, "fragile")
    [ours] = stored_names(state) - before
    with next(state.glob(f"s3lora-*/{ours}/{WEIGHTS}")).open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x7f" * 100)
    for i in range(4):
        assert gate.load(f"filler-{i}", trained).status_code == 200
    gate.complete("fragile", PROMPTS[0], 1)  # reloads the damaged stored copy
    assert "'fragile' is quarantined" in gate.log.read_text()
    assert alike(first_token(gate, "fragile"), first_token(gate, "base"))
    # After a new registration it is served again, without cache blocks from the quarantine.
    assert gate.load("fragile", folder, load_inplace=True).status_code == 200
    assert alike(first_token(gate, "fragile"), whole)
