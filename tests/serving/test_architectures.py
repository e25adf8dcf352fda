"""A guarded engine of other architectures than Llama serves adapters as stock vLLM does.

`make architectures` runs all of them; these are the kinds that differ most.
"""

import subprocess
import sys

import pytest

from tests.runs.architectures.comparison import compare
from tests.runs.architectures.models import named
from tests.runs.architectures.report import holds

pytestmark = pytest.mark.serving

LONG = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("Qwen3.5, hybrid", "LLaVA, with its tower", "Qwen3, classifier")
]
"""Half a minute each, and in the results of `make architectures`, which a test holds; the fuzz
beside stock vLLM has a pooling model."""

KINDS = (*LONG, "gpt-oss, experts in one tensor")
BFLOAT16 = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_is_served_as_by_stock_and_stripped_as_by_hand(name, tmp_path):
    architecture = named(name)
    in_bfloat16 = architecture.engine.get("dtype") == "bfloat16"
    if in_bfloat16 and subprocess.run([sys.executable, "-c", BFLOAT16]).returncode < 0:
        pytest.skip("this machine stops programs that compute in bfloat16")
    found = compare(architecture, tmp_path)
    if "failed" in found:
        pytest.skip(f"vLLM serves no such model here: {found['failed'][:200]}")
    assert holds(found), found
    assert not found["left_out"]
