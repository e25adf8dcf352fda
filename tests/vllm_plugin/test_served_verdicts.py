"""What an API server keeps of the verdicts on served adapters, and where it renders them."""

import json
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from s3lora_serve.admission.verdict import Decision, ModuleVerdict, Verdict
from s3lora_serve.errors import Reason
from s3lora_serve.store.stored_spectra import with_spectra
from s3lora_serve.vllm_plugin.api import rendering
from s3lora_serve.vllm_plugin.api.rendering import verdict_json
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters
from s3lora_serve.vllm_plugin.api.work_threads import WorkThreads
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopy

MODULES = 224
"""Modules of an adapter on all seven projections of a model with 32 layers."""


def verdict(name="acme", rank=16, seed=0, modules=MODULES):
    """A verdict whose values are objects of its own, as those of a decision are."""
    return Verdict(
        path="/adapters/" + name, name=name, digest=f"sha256:{seed}", config_digest="sha256:1",
        decision=Decision.STRIPPED, reason=None, uninformative=False, mode="enforce",
        scorer={"name": "mas-svd"}, policy_digest="sha256:0",
        modules=tuple(
            ModuleVerdict(
                f"model.layers.{n // 7}.self_attn.{n % 7}_proj", n // 7, f"{n % 7}_proj",
                (4096 + n % 7, 4096), rank, 0.5 + n / 1e3, 0.25 + n / 1e3,
                spectrum(seed + n, rank), n / 3.0, n / 5.0,
                n % 50 == 0, n / 1e5,
            )
            for n in range(modules)
        ),
    )  # fmt: skip


def spectrum(first, rank):
    # From a list: Python keeps tuples that were grown from a generator on its list of free ones.
    return tuple([float(first) + k / 7 for k in range(rank)])


@pytest.fixture
def served():
    metrics = SimpleNamespace(serve=lambda _verdict: None, withdraw=lambda _name: None)
    events = SimpleNamespace(metrics=metrics)
    store = SimpleNamespace(is_quarantined=lambda _path: False)
    return ServedAdapters(SimpleNamespace(events=events, store=store), WorkThreads("audit", 1))


def serve(served, verdict, path):
    served.add(None, ServedAdapter(PinnedCopy(1, Path(path)), verdict.path, verdict))


def bytes_for(served, count, rank, *, path):
    """Memory that each of so many served adapters takes."""
    serve(served, verdict("first", rank), "/store/first")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            serve(served, verdict(f"acme/{number}", rank, number), path(number))
        return (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rank", [16, 256])
def test_served_verdict_takes_memory_that_does_not_grow_with_the_rank(served, rank):
    assert bytes_for(served, 20, rank, path="/store/{}".format) < 90_000


@pytest.mark.parametrize("rank", [16, 256])
def test_same_stored_copy_under_more_names_takes_next_to_no_memory(served, rank):
    assert bytes_for(served, 20, rank, path=lambda _: "/store/first") < 5_000


def test_modules_are_dropped_with_the_last_adapter_that_has_them(served):
    serve(served, verdict("one"), "/store/a")
    serve(served, verdict("two"), "/store/a")
    one, two = served.all()
    assert one.verdict.modules is two.verdict.modules
    shared = len(served._modules)
    served._adapters.clear()
    del one, two
    assert (shared, len(served._modules)) == (1, 0)


def test_adapter_that_workers_object_to_in_audit_mode_has_modules_of_its_own(served):
    changed = verdict("one")
    kept = tuple(replace(module, stripped=False) for module in changed.modules)
    serve(served, changed, "/store/a")
    serve(served, replace(verdict("two"), modules=kept), "/store/a")
    assert [bool(one.verdict.stripped) for one in served.all()] == [True, False]


def test_spectra_are_read_back_from_the_stored_copy(served, tmp_path):
    own = verdict("one", modules=3)
    (tmp_path / "verdict.json").write_text(json.dumps(own.as_json()))
    serve(served, own, tmp_path)
    found = served.get("one")
    assert found.verdict != own
    assert with_spectra(found.verdict, tmp_path) == own
    (tmp_path / "verdict.json").write_text("{")
    assert with_spectra(found.verdict, tmp_path) == found.verdict


@pytest.mark.parametrize("spectra", [True, False])
def test_json_text_of_a_verdict_is_that_of_its_json_values(spectra):
    one = replace(verdict("\ud800 \u2028 acme"), reason=Reason("S3LORA-301", "é"))
    assert json.loads(verdict_json(one, spectra=spectra)) == one.as_json(spectra=spectra)


def test_encoder_gets_one_module_at_a_time(monkeypatch):
    sizes, dumps = [], rendering.dumps

    def counted(value):
        text = dumps(value)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(rendering, "dumps", counted)
    text = verdict_json(verdict(rank=256))
    assert len(text) > 1_000_000
    assert max(sizes) < 10_000


@pytest.fixture
def client(served, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from s3lora_serve.vllm_plugin.api.routes import GateRoutes

    policy = SimpleNamespace(mode="enforce", digest="sha256:0", plans=None)
    for number in range(120):
        serve(served, verdict(f"acme/{number}", seed=number, modules=14), tmp_path / str(number))

    async def recheck(_engine):
        return [(one, one.verdict) for one in served.all()]

    registrations = SimpleNamespace(
        served=served, policy=policy, recheck=recheck, policy_problem=None,
        reload_policy=lambda: policy,
        reports=SimpleNamespace(recent=SimpleNamespace(refusals=list)),
    )  # fmt: skip
    routes, app = GateRoutes(lambda: registrations), FastAPI()
    app.add_api_route("/s3lora/", routes.page)
    app.add_api_route("/s3lora/adapters", routes.adapters)
    app.add_api_route("/s3lora/adapters/{name:path}", routes.adapter)
    app.add_api_route("/s3lora/recheck", routes.recheck, methods=["POST"])
    return TestClient(app)


@pytest.fixture
def threads(monkeypatch):
    """Names of the threads that have gone through a verdict's modules."""
    names, as_json, stripped = [], Verdict.as_json, Verdict.stripped.fget

    def noted(own, *more, **options):
        names.append(threading.current_thread().name)
        return own(*more, **options)

    monkeypatch.setattr(Verdict, "as_json", lambda *a, **o: noted(as_json, *a, **o))
    monkeypatch.setattr(Verdict, "stripped", property(lambda self: noted(stripped, self)))
    return names


@pytest.mark.parametrize(
    ("method", "path", "most"),
    [
        ("GET", "/s3lora/adapters?limit=1000", 120),
        ("GET", "/s3lora/adapters/acme/7", 1),
        ("POST", "/s3lora/recheck", 4 * 120),
        ("GET", "/s3lora/", 50),
        ("GET", "/s3lora/?adapter=acme/7", 10),
    ],
)
def test_verdicts_are_rendered_beside_the_servers_loop(client, threads, method, path, most):
    answer = client.request(method, path)
    assert answer.status_code == 200
    assert 0 < len(threads) <= most
    assert {name.rpartition("_")[0] for name in threads} == {"s3lora-pages"}


def test_list_is_rendered_one_adapter_at_a_time_and_says_what_it_said(client, served):
    found = client.get("/s3lora/adapters?offset=3&limit=2").json()
    page = [one.verdict.as_json(spectra=False) for one in served.all()[3:5]]
    assert found == {"offset": 3, "total": 120, "adapters": page}
    assert client.get("/s3lora/adapters?offset=500").json()["adapters"] == []
    answer = client.get("/s3lora/adapters?limit=1000&modules=false")
    assert [one["modules"] for one in answer.json()["adapters"]] == 120 * [[]]
    assert len(answer.content) < 120 * 1500
    with client.stream("GET", "/s3lora/adapters?limit=1000") as answer:
        assert "content-length" not in answer.headers  # sent as it is made
    found = client.post("/s3lora/recheck").json()
    assert set(found) == {"policy_digest", "policy_problem", "adapters"}
    assert set(found["adapters"][0]) == {"name", "differs", "experiment", "before", "after"}
