"""`LLM.generate` with an adapter nobody registered goes through the gate."""

import json
import subprocess
import sys

import pytest

from tests.serving.conftest import PROMPTS
from tests.support.server import base_environment

pytestmark = pytest.mark.serving

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, folder, *prompts = sys.argv[1:]
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
          max_lora_rank=16, max_num_seqs=8)
asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5)
answers = []
for prompt in prompts:  # one at a time, as the server gets them
    [out] = llm.generate(prompt, asked, lora_request=LoRARequest("offline", 1, folder))
    answers.append([{t: v.logprob for t, v in p.items()} for p in out.prompt_logprobs if p])
print("ANSWERS", json.dumps(answers))
"""


def generate(model, folder, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(folder), *PROMPTS],
        env=base_environment() | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    return json.loads(line.removeprefix("ANSWERS "))


def test_adapter_first_used_offline_is_served_without_its_sharp_modules(
    model, spiked, expected, policy_file
):
    found = generate(model, spiked, S3LORA_POLICY=str(policy_file))
    for ours, theirs in zip(found, expected["by-hand"], strict=True):
        for place, other in zip(ours, theirs, strict=True):
            assert place == pytest.approx(other, abs=1e-5)


def test_an_engine_with_a_bad_policy_does_not_start(model, spiked):
    with pytest.raises(AssertionError, match="S3LORA-901"):
        generate(model, spiked, S3LORA_POLICY="/nowhere.yaml")


def test_an_engine_with_a_bad_setting_does_not_start(model, spiked):
    with pytest.raises(AssertionError, match="S3LORA_MODE='sometimes'"):
        generate(model, spiked, S3LORA_MODE="sometimes")
