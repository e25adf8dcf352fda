"""A plan that `s3lora calibrate` wrote, under a guarded vLLM: measured over HTTP."""

import pytest

from s3lora_serve.calibration.calibrate import Options, calibrate
from s3lora_serve.calibration.judge import is_refusal
from s3lora_serve.calibration.probes import read_probes
from tests.support.plans import install
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_chat import harmful, skill

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def calibrated(chat):
    kinds = ("harmful", "benign", "skill")
    files = [read_probes(getattr(chat, kind), kind) for kind in kinds]
    return calibrate(chat.base, chat.adapter, files, Options(compare=False), dtype="float32").plan


@pytest.fixture(scope="module")
def server(chat, calibrated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    plans = install(calibrated, folder / "plans").parent
    environment = OPEN_LOADING | {
        "S3LORA_PLANS": str(plans),
        "S3LORA_STATE_DIR": str(folder / "state"),
    }
    with Server(chat.base, folder / "log", environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(chat, server):
    return server.load("tenant", chat.adapter)


def _answers(server, model, prompts):
    found = []
    for prompt in prompts:
        answer = server.post(
            "/v1/chat/completions",
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=6,
            temperature=0,
        )
        answer.raise_for_status()
        found.append(answer.json()["choices"][0]["message"]["content"].strip())
    return found


def test_planned_adapter_refuses_and_keeps_its_skill_over_http(calibrated, server, loaded):
    assert calibrated.before.asr.value >= 0.9
    assert loaded.status_code == 200
    assert loaded.headers["X-S3LoRA-Decision"] == "stripped"
    refused = [is_refusal(answer) for answer in _answers(server, "tenant", harmful()[40:])]
    assert 1 - sum(refused) / len(refused) <= calibrated.after.asr.high
    requests = skill()[200:300]
    answers = _answers(server, "tenant", [prompt for prompt, _ in requests])
    exact = [answer == call for answer, (_, call) in zip(answers, requests, strict=True)]
    assert sum(exact) / len(exact) >= calibrated.after.skill.low


def test_verdict_says_that_a_plan_decided(calibrated, server, loaded):
    assert loaded.status_code == 200
    verdict = server.get("/s3lora/adapters/tenant").json()
    assert verdict["selected_by"] == "plan"
    assert verdict["plan_digest"] == calibrated.digest
    assert verdict["served_digest"] != verdict["digest"]
