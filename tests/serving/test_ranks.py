"""Several ranks share one verdict, none raises, and one admission is counted once."""

import json

import pytest

from tests.serving.conftest import TOP_K, answers
from tests.support.adapters import copy_with, diverged, key
from tests.support.programs import run_program
from tests.support.server import OPEN_LOADING, TWO_RANKS, Server

pytestmark = pytest.mark.serving
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def ranks(model, spiked, policy_file, workplace):
    environment = OPEN_LOADING | TWO_RANKS | {
        "S3LORA_POLICY": str(policy_file),
        "S3LORA_AUDIT_LOG": str(workplace / "ranks-audit.jsonl"),
    }  # fmt: skip
    arguments = ("--tensor-parallel-size", "2", "--lora-modules", f"static={spiked}")
    with Server(model, workplace / "ranks.log", arguments, environment) as server:
        yield server


def assert_alike(found, expected):
    """Two ranks add up partial sums, so the last bits differ from those of one worker."""
    for ours, theirs in zip(found, expected, strict=True):
        for place, other in zip(ours, theirs, strict=True):
            assert place == pytest.approx(other, abs=1e-4)


def test_every_rank_strips_the_same_modules(ranks, expected):
    assert_alike(answers(ranks, "static"), expected["by-hand"])


def wide(tensors):
    tensors[key(MODULE, "A")] = tensors[key(MODULE, "A")].repeat(1, 2)


@pytest.mark.parametrize(("change", "code"), [(diverged, "109"), (wide, "301")])
def test_a_good_registration_after_a_refused_one_works(
    ranks, expected, spiked, tmp_path, change, code
):
    refused = ranks.load(f"bad-{code}", copy_with(spiked, tmp_path / "bad", change))
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(f"S3LORA-{code}: ")
    good = ranks.load(f"good-{code}", spiked)
    assert (good.status_code, good.headers["X-S3LoRA-Decision"]) == (200, "stripped")
    assert_alike(answers(ranks, f"good-{code}"), expected["by-hand"])
    assert_alike(answers(ranks, "base"), expected["base"])


def test_one_admission_counts_once_and_both_ranks_are_guarded(ranks, spiked, workplace):
    before = ranks.metrics()
    assert ranks.load("counted", spiked).status_code == 200
    after = ranks.metrics()
    for sample, increase in {
        's3lora_admissions_total{decision="stripped",mode="enforce"}': 1,
        's3lora_modules_scored_total{projection="q_proj"}': 4,
        's3lora_admission_seconds_count{phase="strip"}': 1,
        's3lora_admission_seconds_count{phase="total"}': 1,
    }.items():
        assert after[sample] - before[sample] == increase, sample
    active = [v for k, v in after.items() if k.startswith("s3lora_gate_active")]
    assert active == [1, 1]
    assert ranks.get("/s3lora/status").status_code == 200
    lines = (workplace / "ranks-audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["adapter"] for line in lines].count("counted") == 1


def test_the_routes_return_one_verdict_for_both_ranks(ranks, spiked, tmp_path):
    assert ranks.load("acme/listed", spiked).status_code == 200
    adapter = ranks.get("/s3lora/adapters/acme/listed").json()
    assert sum(module["stripped"] for module in adapter["modules"]) == TOP_K
    assert all(module["spectrum"] for module in adapter["modules"])
    listed = ranks.get("/s3lora/adapters").json()
    assert [one["name"] for one in listed["adapters"]].count("acme/listed") == 1
    scanned = ranks.post("/s3lora/scan", lora_name="acme/listed", lora_path=str(spiked)).json()
    assert (scanned["decision"], scanned["digest"]) == ("stripped", adapter["digest"])
    wide_copy = copy_with(spiked, tmp_path / "wide", wide)
    refused = ranks.post("/s3lora/scan", lora_name="wide", lora_path=str(wide_copy)).json()
    assert refused["reason"]["code"] == "S3LORA-301"
    rechecked = ranks.post("/s3lora/recheck").json()["adapters"]
    assert {one["name"]: one["differs"] for one in rechecked}["acme/listed"] is False
    assert "acme/listed" in ranks.get("/s3lora/").text


FAULTS = """
import dataclasses
import os
from s3lora_serve.admission import scoring
from s3lora_serve.store import stored_copy

scored, opened = scoring.score_modules, stored_copy.open_stored_copy

def rank():
    from vllm.distributed.parallel_state import get_world_group
    return get_world_group().rank_in_group

def score_modules(*arguments, **options):
    return [
        dataclasses.replace(s, relative_ssi=s.relative_ssi if rank() == 0 else 1 - s.relative_ssi)
        for s in scored(*arguments, **options)
    ]

def open_stored_copy(path):
    if rank() == 1 and os.path.exists(os.environ["RANK_1_FAILS"]):
        raise MemoryError("no room on this rank")
    return opened(path)

scoring.score_modules, stored_copy.open_stored_copy = score_modules, open_stored_copy
"""
PROGRAM = """
import asyncio, json, os, sys
from pathlib import Path
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

model, *folders = sys.argv[1:]
X, Y = (LoRARequest(Path(f).name, i, f) for i, f in enumerate(folders, 1))

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
        max_lora_rank=16, max_num_seqs=8, tensor_parallel_size=2, max_loras=1, max_cpu_loras=1,
    ))
    count = 0

    async def ask(adapter):  # directly to the engine, without a registration
        nonlocal count
        count += 1
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, prompt_logprobs=2)
        async for out in engine.generate("Q: What", params, str(count), lora_request=adapter):
            pass
        return [{t: v.logprob for t, v in p.items()} for p in out.prompt_logprobs if p]

    async def held():
        return await engine.collective_rpc("s3lora_loaded", args=("", 1))

    base, whole, agreed = await ask(None), await ask(X), await held()
    await ask(Y)  # evicts X
    Path(os.environ["RANK_1_FAILS"]).touch()
    await ask(X)
    failed, after = await held(), await ask(X)
    print("FOUND", json.dumps([agreed, failed, whole == base, after == base]))
    engine.shutdown()

asyncio.run(main())
"""


def test_ranks_that_score_differently_or_fail_alone_serve_the_same_weights(
    model, spiked, trained, policy_file, tmp_path
):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULTS)
    environment = TWO_RANKS | {
        "S3LORA_POLICY": str(policy_file),
        "S3LORA_STATE_DIR": str(tmp_path),
        "S3LORA_AUDIT_LOG": str(tmp_path / "audit.jsonl"),
        "PYTHONPATH": str(tmp_path / "site"),
        "RANK_1_FAILS": str(tmp_path / "rank-1-fails"),
    }
    found, _ = run_program("-c", PROGRAM, model, spiked, trained, **environment)
    agreed, failed, stripped_to_nothing, quarantined = found
    assert agreed[0] == agreed[1]
    assert agreed[0][0] is not None
    stored_names = [path.name for path in tmp_path.glob("s3lora-*/*") if len(path.name) == 64]
    assert len(stored_names) == 4, "the ranks did not disagree on both adapters"
    assert agreed[0][0] in stored_names
    assert not stripped_to_nothing
    # One rank cannot reload the adapter: from the next step on, no rank serves it.
    assert [held for held, _ in failed] == [None, None]
    assert [refusal[0] for _, refusal in failed] == ["S3LORA-403", "S3LORA-401"]
    assert quarantined
    entries = [json.loads(text) for text in (tmp_path / "audit.jsonl").read_text().splitlines()]
    doors = [(entry["adapter"], entry["door"]) for entry in entries]
    assert doors.count(("spiked", "engine")) == doors.count(("spiked", "quarantine")) == 1
    assert len(entries[0]["stripped"]) == TOP_K
