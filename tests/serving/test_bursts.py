"""Bursts of loads on a real vLLM: all are answered, the others are served, and nothing is left."""

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import requests
import torch

from tests.runs.load.burst import burst, leftovers
from tests.serving.conftest import answers
from tests.support.adapters import copy_with, key, renamed
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import LAYERS

pytestmark = pytest.mark.serving

OPEN = "strip: {top_k: 0}\n...\n"
MANY = 16
PASSING = ("reports", "private copies", "preloads", "waiting loads")
SETTLED_SECONDS = 30


@pytest.fixture(scope="module")
def policy(workplace):
    file = workplace / "bursts.yaml"
    file.write_text(OPEN)
    return file


@pytest.fixture(scope="module")
def store(workplace):
    return workplace / "bursts-state"


@pytest.fixture(scope="module")
def bursting(model, trained, policy, store, workplace):
    """A guarded server; at its end it gets SIGINT while many loads wait."""
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy),
        "S3LORA_STATE_DIR": str(store),
    }
    server = Server(model, workplace / "bursts.log", (), environment)
    with server, ThreadPoolExecutor(MANY) as clients:
        yield server
        for number in range(MANY):
            clients.submit(_load_and_ignore, server, f"last-{number}", trained)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) is not None, "the server does not end"


def _load_and_ignore(server, name, folder):
    with contextlib.suppress(requests.RequestException):
        server.load(name, folder)


def test_all_loads_of_a_burst_are_answered_beside_base_requests_and_nothing_is_left(
    bursting, trained, spiked, store
):
    """Four preloads were kept, and those beyond were awaited for ever."""
    adapters = [(f"burst-{i}", (trained, spiked)[i % 2]) for i in range(MANY)]
    seen = burst(bursting, adapters, quiet_seconds=1, store=store, settling=5)
    assert seen.statuses == {"200": MANY}
    left = {what: after for what, (_, after) in seen.left.items()}
    assert left["pins"] <= seen.left["pins"][0]
    assert {left[what] for what in PASSING} == {0.0}
    assert answers(bursting, "base")


def test_clients_that_leave_at_any_moment_leave_nothing_behind(bursting, trained, store):
    """The pin of each was kept for the server's life, until the store was full for everyone."""
    with ThreadPoolExecutor(25) as clients:
        for number in range(25):
            clients.submit(_leave, bursting, f"leaving-{number}", trained, 0.02 * number)

    def left():
        for model in bursting.get("/v1/models").json()["data"]:
            if model["id"].startswith("leaving-"):
                bursting.unload(model["id"])  # its answer was on its way as the client left
        served = bursting.get("/s3lora/adapters").json()["adapters"]
        found = leftovers(bursting, store)
        copies = {(one["digest"], one["policy_digest"]) for one in served}
        pinned = found["pins"] - len(copies)
        return {"pins": pinned} | {what: found[what] for what in PASSING}, served

    deadline = time.monotonic() + SETTLED_SECONDS
    while any(left()[0].values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    found, served = left()
    assert not any(found.values()), (found, [one["name"] for one in served], bursting.tail())


def _leave(server, name, folder, seconds):
    body = {"lora_name": name, "lora_path": str(folder)}
    with contextlib.suppress(requests.Timeout):
        requests.post(server.url("/v1/load_lora_adapter"), json=body, timeout=seconds + 0.001)


def test_one_tenants_many_loads_do_not_hold_up_anothers(bursting, trained):
    with ThreadPoolExecutor(20) as clients:
        greedy = [
            clients.submit(bursting.load, f"greedy/{number}", trained) for number in range(15)
        ]
        wait(greedy[:1])
        assert bursting.load("modest/one", trained).status_code == 200
        waiting = sum(not load.done() for load in greedy)
        assert all(load.result().status_code == 200 for load in greedy)
    assert waiting >= 5, "the other tenant's load came after nearly all of the first's"
    for name in [*(f"greedy/{number}" for number in range(15)), "modest/one"]:
        bursting.unload(name)


def test_modules_that_the_model_lacks_are_not_scored(bursting, trained, tmp_path):
    """Hundreds of them, of dimensions that the model has."""

    def add(tensors):
        for side in "AB":
            one = tensors[key("model.layers.0.self_attn.q_proj", side)]
            for layer in range(LAYERS, 300):
                tensors[key(f"model.layers.{layer}.self_attn.q_proj", side)] = one.clone()

    move = renamed(lambda name: name.replace(".layers.", ".layers.9"))
    before = scored(bursting)
    refused = bursting.load("foreign", copy_with(trained, tmp_path / "foreign", move))
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("S3LORA-303: ")
    assert scored(bursting) == before
    assert bursting.load("many", copy_with(trained, tmp_path / "many", add)).status_code == 200
    assert scored(bursting) == before + 28
    verdict = bursting.get("/s3lora/adapters/many").json()
    assert (len(verdict["modules"]), len(verdict["left_out"])) == (28, 300 - LAYERS)
    assert (
        "296 parts that the served model does not take"
        in bursting.get("/s3lora/?adapter=many").text
    )
    bursting.unload("many")


def scored(server):
    found = server.metrics()
    return sum(v for k, v in found.items() if k.startswith("s3lora_modules_scored_total"))


@pytest.mark.parametrize(
    ("rates", "adapter", "statuses"),
    [
        ("loads_per_minute: 2", "good", [200, 200, 429]),
        ("refusals_per_minute: 1", "bad", [400, 429]),
    ],
)
def test_loads_over_the_policys_rates_are_told_when_to_come_back(
    bursting, trained, policy, tmp_path, rates, adapter, statuses
):
    def diverge(tensors):
        next(iter(tensors.values()))[0, 0] = torch.nan

    tenant = f"rated-{adapter}"
    folder = trained if adapter == "good" else copy_with(trained, tmp_path / "bad", diverge)
    policy.write_text(f"rates: {{{rates}}}\n{OPEN}")
    try:
        assert bursting.load("takes-the-policy-up", trained).status_code == 200
        given = [bursting.load(f"{tenant}/{i}", folder) for i in range(len(statuses))]
        scan = bursting.post("/s3lora/scan", lora_name=f"{tenant}/x", lora_path=str(folder))
        alias = bursting.post("/adapters", name=f"{tenant}/y", src=str(folder))
        other = bursting.load("not-rated/one", trained)
    finally:
        policy.write_text(OPEN)
        bursting.unload("takes-the-policy-up")
    assert [one.status_code for one in given] == statuses
    assert given[-1].json()["error"]["type"] == "LoadPostponed"
    for one in (given[-1], scan, alias):
        assert one.status_code == 429
        assert "S3LORA-220" in one.text
        assert 1 <= int(one.headers["Retry-After"]) <= 60
    assert other.status_code == 200
    bursting.unload("not-rated/one")
    assert bursting.load("takes-the-policy-down", trained).status_code == 200
    bursting.unload("takes-the-policy-down")
    for number in range(len(statuses)):
        bursting.unload(f"{tenant}/{number}")
