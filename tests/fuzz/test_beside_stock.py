"""What stock vLLM serves of adapters with other names and configurations, the gate serves the same.

The test suite draws hundreds, `make fuzz` thousands (FUZZ_EXAMPLES is capped: each is loaded twice
into a real engine).
"""

import os
from pathlib import Path

import pytest

from tests.fuzz import changed_adapters
from tests.runs.architectures.served import KEEP_ALL
from tests.support.programs import run_program
from tests.support.server import ONE_CORE

pytestmark = [pytest.mark.serving, pytest.mark.timeout(0)]

EXAMPLES = min(int(os.environ.get("FUZZ_EXAMPLES", "120")), 5000)
MODELS = "Llama", "Qwen3, embeddings", "gpt-oss, experts in one tensor"
MORE = "Qwen3, tied", "Qwen3-MoE", "Mixtral", "Phi-3", "Qwen3.5, hybrid", "LLaVA, with its tower"
DOCS = Path(__file__).parent.parent.parent / "docs" / "adapters.md"


def beside_stock(model, tmp_path, seed):
    """How many drawn adapters stock vLLM served, and the gate admitted or refused with a code."""
    policy = tmp_path / "policy.json"
    policy.write_text(KEEP_ALL)
    found, _ = run_program(
        "-m", "tests.fuzz.beside_stock", model, EXAMPLES, seed,
        seconds=None,
        S3LORA_POLICY=str(policy),
        S3LORA_STATE_DIR=str(tmp_path),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        **ONE_CORE,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_drawn_adapter_that_stock_serves_is_served_the_same_or_refused_with_a_documented_code(
    model, tmp_path, pytestconfig
):
    found = beside_stock(model, tmp_path, pytestconfig.getoption("randomly_seed", 1))
    assert found.get("served, admitted", 0) > sum(found.values()) / 4
    assert sum(found.values()) >= EXAMPLES / 2


@pytest.mark.slow
@pytest.mark.parametrize("model", MORE)
def test_the_same_on_more_architectures(model, tmp_path, pytestconfig):
    found = beside_stock(model, tmp_path, pytestconfig.getoption("randomly_seed", 1))
    assert found.get("served, admitted", 0) > 0


def test_each_code_with_which_the_gate_may_refuse_what_stock_serves_is_explained():
    codes = {each for each in vars(changed_adapters).values() if str(each).startswith("S3LORA-")}
    text = DOCS.read_text()
    _, _, section = text.partition("## What stock vLLM serves and the gate refuses")
    assert codes
    assert all(code in section for code in codes)
