"""Two pipeline stages, each with some of the layers, enforce one verdict."""

import pytest

from tests.serving.conftest import TOP_K
from tests.support.adapters import copy_with, key
from tests.support.server import OPEN_LOADING, TWO_RANKS, Server

pytestmark = pytest.mark.serving
STAGES = ("--pipeline-parallel-size", "2")
LAST_MODULE = "model.layers.3.self_attn.q_proj"  # in the second stage


def wide(tensors):
    tensors[key(LAST_MODULE, "A")] = tensors[key(LAST_MODULE, "A")].repeat(1, 2)


@pytest.mark.slow  # a minute for two stages to start
def test_an_adapter_is_decided_on_once_and_loaded_by_both_stages(
    model, spiked, policy_file, tmp_path
):
    environment = OPEN_LOADING | TWO_RANKS | {
        "S3LORA_POLICY": str(policy_file),
        "VLLM_SERVER_DEV_MODE": "1",  # POST /collective_rpc lists each stage's adapters
    }  # fmt: skip
    with Server(model, tmp_path / "log", STAGES, environment) as server:

        def ids_of_stages():
            return server.post("/collective_rpc", method="list_loras").json()["results"]

        assert server.load("acme", spiked).headers["X-S3LoRA-Decision"] == "stripped"
        one, other = ids_of_stages()
        assert one == other != []
        adapter = server.get("/s3lora/adapters/acme").json()
        counted = [m for m in adapter["modules"] if m["stripped"] and not m["negligible"]]
        assert (len(adapter["modules"]), len(counted)) == (28, TOP_K)
        # An error that only one stage can detect removes the adapter from both.
        refused = server.load("bad", copy_with(spiked, tmp_path / "bad", wide))
        assert refused.json()["error"]["message"].startswith("S3LORA-301: ")
        assert ids_of_stages() == [one, other]
        admissions = 's3lora_admissions_total{decision="stripped",mode="enforce"}'
        assert server.metrics()[admissions] == 1
        assert server.get("/s3lora/status").json() == {"guarded": True}


@pytest.mark.slow
def test_vllms_cpu_build_answers_nothing_with_two_stages(model, tmp_path):
    """The test above checks no answers because stock vLLM's engine dies on its first request."""
    with Server(model, tmp_path / "log", STAGES, TWO_RANKS, guarded=False) as server:
        answer = server.post("/v1/completions", model="base", prompt="Q", max_tokens=1)
        assert answer.status_code == 500
        assert "assert self.intermediate_tensors is not None" in server.log.read_text()
