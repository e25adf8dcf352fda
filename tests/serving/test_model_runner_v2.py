"""vLLM's model runner V2, the default on CUDA: adapters pass the gate there as under V1.

Its kernels run in Triton's interpreter, so numbers are compared to some digits.
"""

import pytest

from tests.serving.conftest import answers, evicting_server
from tests.support.adapters import copy_with, diverged
from tests.support.programs import run_program
from tests.support.triton_interpreter import for_all_processes

pytestmark = pytest.mark.serving


DISPATCH = """
import sys
from types import SimpleNamespace
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState, get_num_active_loras_for_dispatch
from vllm.v1.worker.gpu_input_batch import InputBatch
from s3lora_serve.vllm_plugin.engine.idle_adapters import batch_as_base
from tests.support.programs import print_result

LOADED = {"whole": SimpleNamespace(loras={"q_proj": 1}), "nothing left": SimpleNamespace(loras={})}
manager = SimpleNamespace(get_adapter=lambda _id: LOADED.get(sys.argv[1]))
batch_as_base(SimpleNamespace(_adapter_manager=manager))
request = LoRARequest("a", 7, "/a")
state = LoraState(4)
state.add_request("r", 0, request)
first = SimpleNamespace(lora_request=request, req_id="r")
class Batch(InputBatch):
    def __init__(self):
        pass
try:
    InputBatch.add_request(Batch(), first)
except AttributeError:
    pass  # nothing else of a batch is there
print_result({
    "v1": int(first.lora_request is not None),
    "v2": get_num_active_loras_for_dispatch(SimpleNamespace(max_loras=2), state, ["r"], False),
})
"""
"""Counts the adapters by which each model runner chooses its graph, for one request."""


@pytest.fixture(scope="module")
def gate(model, policy_file, workplace):
    """A guarded server on model runner V2, with room for two adapters."""
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1", **for_all_processes(workplace / "interpreter")}
    with evicting_server(model, workplace, "v2", policy_file, **variables) as server:
        assert "Using V2 Model Runner" in server.log.read_text()
        yield server


def close(found, expected):
    """Whether the log-probabilities of the same likeliest tokens agree to 1e-3."""
    return all(
        one.keys() == other.keys() and one == pytest.approx(other, abs=1e-3)
        for answer, wanted in zip(found, expected, strict=True)
        for one, other in zip(answer, wanted, strict=True)
    )


def test_a_sharp_adapter_is_served_stripped_also_after_its_eviction(
    gate, expected, spiked, trained, tmp_path
):
    folder = copy_with(spiked, tmp_path / "sharp")
    response = gate.load("sharp", folder)
    assert (response.status_code, response.headers["X-S3LoRA-Decision"]) == (200, "stripped")
    assert close(answers(gate, "sharp"), expected["by-hand"])
    assert not close(answers(gate, "sharp"), expected["whole"])
    for name in ("second", "third"):
        assert gate.load(name, trained).status_code == 200
        assert close(answers(gate, name), expected["trained by-hand"])
    (folder / "adapter_config.json").unlink()
    assert close(answers(gate, "sharp"), expected["by-hand"])
    assert close(answers(gate, "base"), expected["base"])


def test_a_refused_adapter_is_not_served(gate, expected, spiked, tmp_path):
    response = gate.load("nan", copy_with(spiked, tmp_path / "nan", diverged))
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("S3LORA-109: ")
    assert "nan" not in {entry["id"] for entry in gate.get("/v1/models").json()["data"]}
    assert close(answers(gate, "base"), expected["base"])


@pytest.mark.parametrize("loaded", ["whole", "nothing left", "not yet"])
def test_requests_of_an_adapter_without_effect_take_the_graph_without_lora(loaded):
    found, _ = run_program("-c", DISPATCH, loaded)
    assert found == {"v1": int(loaded != "nothing left"), "v2": int(loaded != "nothing left")}


def test_every_worker_says_that_it_is_guarded(gate):
    assert gate.get("/s3lora/status").json() == {"guarded": True}
