"""Every way to load an adapter into a real vLLM server passes the gate; stripped modules have no
effect."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import replace
from functools import partial

import pytest

from s3lora_serve import scan_adapter
from s3lora_serve.policy.file import read_policy
from tests.serving.conftest import TOP_K, answers, log_of_failed_start
from tests.support.adapters import WEIGHTS, copy_with, key, renamed, spike, train_adapter
from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def name():
    """A name that no other test uses on the shared server."""
    return f"tenant-{uuid.uuid4().hex[:8]}"


def test_the_planted_adapter_behaves_otherwise_when_stripped(expected):
    assert expected["whole"] != expected["by-hand"] != expected["base"] != expected["whole"]


def test_static_adapter_is_served_without_its_sharp_modules(enforcing, expected):
    assert answers(enforcing, "static") == expected["by-hand"]


def test_adapter_registered_over_http_is_served_without_its_sharp_modules(
    enforcing, expected, spiked, name
):
    response = enforcing.load(name, spiked)
    assert response.status_code == 200
    assert response.text == f"Success: LoRA adapter '{name}' added successfully."
    assert response.headers["X-S3LoRA-Decision"] == "stripped"
    assert answers(enforcing, name) == expected["by-hand"]


def test_adapter_found_by_a_resolver_is_served_without_its_sharp_modules(enforcing, expected):
    assert answers(enforcing, "resolved") == expected["by-hand"]


def test_adapter_a_resolver_finds_and_the_gate_refuses_is_not_served(enforcing):
    response = enforcing.post("/v1/completions", model="resolved-nan", prompt="Q", max_tokens=1)
    assert response.status_code == 400
    assert "resolved-nan" in response.json()["error"]["message"]
    assert answers(enforcing, "base")


def test_adapter_replaced_in_place_passes_the_gate_again(
    enforcing, expected, trained, spiked, name, tmp_path
):
    folder = copy_with(spiked, tmp_path / "tenant")
    assert enforcing.load(name, folder).status_code == 200
    assert answers(enforcing, name) == expected["by-hand"]
    shutil.copy(trained / WEIGHTS, folder / WEIGHTS)
    response = enforcing.load(name, folder, load_inplace=True)
    assert response.headers["X-S3LoRA-Decision"] == "stripped"
    assert answers(enforcing, name) == expected["trained by-hand"]


def test_what_is_served_is_no_longer_the_tenants_file(enforcing, expected, spiked, name, tmp_path):
    folder = copy_with(spiked, tmp_path / "tenant")
    assert enforcing.load(name, folder).status_code == 200
    with (folder / WEIGHTS).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\x7f" * (size // 4))
        file.truncate(size // 2)
    shutil.rmtree(folder)
    assert answers(enforcing, name) == expected["by-hand"]


@pytest.mark.slow  # a server more; test_requests_without_effect.py has the claim on an engine
def test_a_fully_stripped_adapter_serves_exactly_the_base_model(
    model, expected, trained, workplace
):
    policy = workplace / "strip-all.yaml"
    policy.write_text("strip: {threshold: 0.0}\nlimits: {max_stripped_fraction: 1.0}\n")
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy)}
    with Server(model, workplace / "strip-all.log", (), environment) as server:
        assert server.load("nothing-left", trained).status_code == 200
        assert answers(server, "nothing-left") == expected["base"]
        assert server.metrics()['s3lora_modules_scored_total{projection="q_proj"}'] == 4


BAD = {
    "NaN": (partial(copy_with, change=lambda t: t[key(MODULE, "A")].fill_(float("nan"))), "109"),
    "no A": (partial(copy_with, change=lambda t: t.pop(key(MODULE, "A"))), "108"),
    "not a LoRA": (partial(copy_with, peft_type="IA3"), "103"),
    "over the scaling limit": (partial(copy_with, lora_alpha=10_000), "201"),
}


def narrow(tensors):
    tensors[key(MODULE, "A")] = tensors[key(MODULE, "A")][:, :64]


def wide(tensors):
    tensors[key(MODULE, "A")] = tensors[key(MODULE, "A")].repeat(1, 2)


def tall(tensors):
    tensors[key(MODULE, "B")] = tensors[key(MODULE, "B")].repeat(2, 1)


other_layers = renamed(lambda name: name.replace(".layers.", ".layers.7"))


def mapped_twice(tensors):
    # Without the prefix, vLLM and the reader both resolve it to the same module.
    tensors[f"{MODULE}.lora_A.weight"] = tensors[key(MODULE, "A")].clone()


def out_of_range(tensors):
    for module in (MODULE, "model.layers.1.self_attn.v_proj"):  # one alone: others negligible
        tensors[key(module, "B")][0, 0] = 3e38  # finite, but not when scaled by 2


BAD |= {
    "beyond the dtype once scaled": (partial(copy_with, change=out_of_range), "109"),
    "narrower than the model": (partial(copy_with, change=narrow), "301"),
    "wider than the model": (partial(copy_with, change=wide), "301"),
    "taller than the model": (partial(copy_with, change=tall), "301"),
    "no module the model has": (partial(copy_with, change=other_layers), "303"),
    "a module twice": (partial(copy_with, change=mapped_twice), "111"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter_is_refused_with_its_code_and_leaves_the_engine_whole(
    enforcing, expected, spiked, tmp_path, name, case
):
    make, code = BAD[case]
    response = enforcing.load(name, make(spiked, tmp_path / "bad"))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("AdapterRejected", 400)
    assert error["message"].startswith(f"S3LORA-{code}: ")
    assert "stack trace" not in error["message"]
    assert response.headers["X-S3LoRA-Decision"] == "rejected"
    served = {entry["id"] for entry in enforcing.get("/v1/models").json()["data"]}
    assert name not in served
    assert answers(enforcing, "static") == expected["by-hand"]
    assert answers(enforcing, "base") == expected["base"]


@pytest.mark.parametrize("broken", ["no config", "no weights", "garbage", "truncated", "pickle"])
def test_broken_files_are_refused_with_their_code(enforcing, spiked, tmp_path, name, broken):
    folder = copy_with(spiked, tmp_path / "broken")
    weights = folder / WEIGHTS
    if broken == "no config":
        (folder / "adapter_config.json").unlink()
    elif broken == "no weights":
        weights.unlink()
    elif broken == "garbage":
        weights.write_bytes(b"garbage" * 100)
    elif broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.rename(folder / "adapter_model.bin")
    response = enforcing.load(name, folder)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "AdapterRejected"
    assert response.json()["error"]["message"].startswith("S3LORA-1")


def test_vllms_own_refusals_keep_their_meaning(enforcing, spiked, name):
    assert enforcing.load(name, spiked / "nowhere").status_code == 404
    again = enforcing.load("static", spiked)
    assert again.status_code == 400
    assert "already been loaded" in again.json()["error"]["message"]
    assert enforcing.post("/v1/load_lora_adapter", lora_name=name).status_code == 400


def test_rank_over_the_servers_maximum_is_refused(enforcing, model, name, tmp_path):
    folder = train_adapter(model, tmp_path / "rank-32", r=32)
    response = enforcing.load(name, folder)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("S3LORA-302: vLLM says: LoRA rank 32")


def test_static_adapter_that_is_refused_stops_the_start(model, spiked, workplace, tmp_path):
    bad = BAD["NaN"][0](spiked, tmp_path / "bad")
    server = Server(model, workplace / "static.log", ("--lora-modules", f"bad={bad}"))
    log_of_failed_start(server)
    assert "S3LORA-109" in server.tail(30)


def test_the_list_of_models_shows_each_tenants_own_path(
    enforcing, spiked, resolver_folder, name, tmp_path
):
    first, second = (copy_with(spiked, tmp_path / each) for each in ("first", "second"))
    requested = f"{first}/../first"  # not normalised
    assert enforcing.load(name, requested).status_code == 200
    enforcing.complete("resolved", "Q", 1)

    def roots():
        return {card["id"]: card["root"] for card in enforcing.get("/v1/models").json()["data"]}

    shown = roots()
    assert shown[name] == requested
    assert shown["static"] == str(spiked)
    assert shown["resolved"] == str(resolver_folder / "resolved")
    assert enforcing.load(name, second, load_inplace=True).status_code == 200
    assert roots() == shown | {name: str(second)}


def test_status_says_guarded(enforcing):
    response = enforcing.get("/s3lora/status")
    assert (response.status_code, response.json()) == (200, {"guarded": True})


def test_metrics_agree_with_the_verdict(enforcing, spiked, policy_file, name, tmp_path):
    folder = copy_with(spiked, tmp_path / "tenant", spike("model.layers.3.mlp.up_proj"))
    before = enforcing.metrics()
    assert enforcing.load(name, folder).status_code == 200
    after = enforcing.metrics()
    verdict = scan_adapter(folder, read_policy(policy_file))
    counted = [m for m in verdict.modules if m.stripped and not m.negligible]
    assert len(counted) == TOP_K

    def increase(sample):
        return after[sample] - before[sample]

    assert increase('s3lora_admissions_total{decision="stripped",mode="enforce"}') == 1
    for module in verdict.modules:
        stripped = f'{{layer="{module.layer}",projection="{module.projection}"}}'
        assert increase(f"s3lora_modules_stripped_total{stripped}") == int(module.stripped)
    for projection in {module.projection for module in verdict.modules}:
        found = [m.ssi for m in verdict.modules if m.projection == projection]
        label = f'{{projection="{projection}"}}'
        assert increase(f"s3lora_modules_scored_total{label}") == len(found)
        assert increase(f"s3lora_module_ssi_count{label}") == len(found)
        assert increase(f"s3lora_module_ssi_sum{label}") == pytest.approx(sum(found))
    for phase in ("read", "score", "strip", "total"):
        assert increase(f's3lora_admission_seconds_count{{phase="{phase}"}}') == 1
    assert increase('s3lora_scoring_seconds_count{device="cpu"}') == 1
    active = [v for k, v in after.items() if k.startswith("s3lora_gate_active")]
    assert active == [1]
    [info] = [k for k, v in after.items() if k.startswith("s3lora_policy_info") and v == 1]
    assert 'mode="enforce"' in info


def audit_lines(workplace, count, **wanted):
    """The lines with these values, once there are `count`: some follow a request's answer."""
    deadline = time.monotonic() + 30
    while True:
        lines = [json.loads(line) for line in (workplace / "audit.jsonl").read_text().splitlines()]
        found = [line for line in lines if wanted.items() <= line.items()]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_every_decision_is_in_the_audit_log(enforcing, spiked, workplace, name, tmp_path):
    tenant = replace(enforcing, client="127.0.0.7")  # refused for the first time
    assert tenant.load(name, spiked).status_code == 200
    bad = BAD["NaN"][0](spiked, tmp_path / "bad")
    assert tenant.load(f"{name}-bad", bad).status_code == 400
    [line] = audit_lines(workplace, 1, adapter=name)
    assert (line["event"], line["door"], line["decision"]) == ("decision", "http", "stripped")
    assert len(line["stripped"]) == TOP_K
    assert list((workplace / "enforcing-state").glob(f"*/{line['stored_copy']}"))
    assert line["vllm_version"]
    [bad_line] = audit_lines(workplace, 1, adapter=f"{name}-bad")
    assert (bad_line["decision"], bad_line["reason"]) == ("rejected", "S3LORA-109")
    assert bad_line["stored_copy"] is None
    for one in (line, bad_line):
        assert one["asked_by"] == {"key": None, "address": "127.0.0.7"}


def test_scans_replacements_and_unloads_are_in_the_audit_log(
    enforcing, spiked, trained, workplace, name
):
    asked_by = {"key": None, "address": "127.0.0.1"}
    scanned = enforcing.post("/s3lora/scan", lora_name=name, lora_path=str(spiked))
    assert scanned.status_code == 200
    [scan] = audit_lines(workplace, 1, adapter=name)
    assert (scan["event"], scan["decision"], scan["asked_by"]) == ("scan", "stripped", asked_by)
    assert enforcing.load(name, spiked).status_code == 200
    assert enforcing.load(name, spiked, load_inplace=True).status_code == 200  # replaces nothing
    assert enforcing.load(name, trained, load_inplace=True).status_code == 200
    first, same, second = audit_lines(workplace, 3, adapter=name, event="decision")
    assert first["stored_copy"] == same["stored_copy"] != second["stored_copy"]
    [replaced] = audit_lines(workplace, 1, adapter=name, event="replacement")
    assert (replaced["digest"], replaced["stored_copy"]) == (first["digest"], first["stored_copy"])
    after = {"digest": second["digest"], "stored_copy": second["stored_copy"]}
    assert (replaced["replaced_by"], replaced["asked_by"]) == (after, asked_by)
    assert enforcing.unload(name).status_code == 200
    [ended] = audit_lines(workplace, 1, adapter=name, event="unload")
    assert (ended["stored_copy"], ended["asked_by"]) == (second["stored_copy"], asked_by)


def engine_of(server):
    """The process of the server's engine."""
    command = ["ps", "-o", "pid=,args=", "-s", str(server.process.pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [engine] = [line for line in found.splitlines() if "EngineCore" in line]
    return int(engine.split()[0])


def test_a_load_whose_client_leaves_after_its_admission_is_in_the_audit_log(
    enforcing, spiked, model, resolver_folder, workplace, name
):
    """vLLM cancels a completion whose client leaves, and with it the load by a resolver."""
    copy_with(spiked, resolver_folder / name, outlier, base_model_name_or_path=str(model))
    stored = workplace / "enforcing-state"
    before = set(stored.glob(f"*/*/{WEIGHTS}"))
    client = http.client.HTTPConnection("127.0.0.1", enforcing.port)
    engine = engine_of(enforcing)
    os.kill(engine, signal.SIGSTOP)  # the load cannot end
    try:
        body = json.dumps({"model": name, "prompt": "Q", "max_tokens": 1})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + 30
        while before == set(stored.glob(f"*/*/{WEIGHTS}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # from the store to the engine
        client.close()
        time.sleep(0.5)  # until the server has seen that
    finally:
        os.kill(engine, signal.SIGCONT)
    [line] = audit_lines(workplace, 1, adapter=name)
    assert (line["event"], line["failure"]) == ("load_failed", "cancelled")
    assert (line["door"], line["decision"]) == ("resolver", "stripped")
    assert line["asked_by"]["address"] == "127.0.0.1"
    assert enforcing.get("/health").status_code == 200


def outlier(tensors):
    """Weights that no other test has stored."""
    first = next(iter(tensors))
    tensors[first] = tensors[first] * 1.25


LONE = "half \ud83d of a character"


@pytest.mark.parametrize("where", ["name", "path", "adapter_config.json"])
def test_a_lone_surrogate_in_a_refused_load_breaks_no_page_route_or_log(
    enforcing, spiked, tmp_path, workplace, name, where
):
    folder = str(tmp_path)
    if where == "name":
        name += LONE
    elif where == "path":
        folder += f"/{LONE}"
    else:
        folder = str(copy_with(spiked, tmp_path / "bad", bias=LONE))
    code = "110" if where == "adapter_config.json" else "224"
    for _ in range(2):  # the refusal is remembered
        response = enforcing.load(name, folder)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"S3LORA-{code}: ")
        page = enforcing.get("/s3lora/")
        assert page.status_code == 200
        assert f"S3LORA-{code}" in page.text
    body = {"lora_name": name, "lora_path": folder}
    scanned = enforcing.post("/s3lora/scan", **body)
    assert scanned.status_code in (200, 400, 422)
    assert "\\ud83d" in scanned.text
    for route in ("/s3lora/adapters", "/v1/models", "/metrics"):
        assert enforcing.get(route).status_code == 200
    assert enforcing.post("/s3lora/recheck").status_code == 200
    log = enforcing.log.read_text()
    assert "UnicodeEncodeError" not in log
    assert "Logging error" not in log
    lines = [json.loads(line) for line in (workplace / "audit.jsonl").read_text().splitlines()]
    assert f"S3LORA-{code}" in {line["reason"] for line in lines}
