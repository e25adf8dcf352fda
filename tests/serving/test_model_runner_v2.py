"""vLLM's model runner V2, the default on CUDA: adapters pass the gate there as under V1.

Its kernels run in Triton's interpreter, so numbers are compared to some digits.
"""

import pytest

from tests.serving.conftest import answers, close, evicting_server
from tests.support.adapters import copy_with, diverged
from tests.support.triton_interpreter import for_all_processes

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def gate(model, policy_file, workplace):
    """A guarded server on model runner V2, with room for two adapters."""
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1", **for_all_processes(workplace / "interpreter")}
    with evicting_server(model, workplace, "v2", policy_file, **variables) as server:
        assert "Using V2 Model Runner" in server.log.read_text()
        yield server


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


def test_every_worker_says_that_it_is_guarded(gate):
    assert gate.get("/s3lora/status").json() == {"guarded": True}
