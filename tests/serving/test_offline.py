"""An adapter that `LLM.generate` uses without registration passes the gate."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.serving.conftest import PROMPTS
from tests.support.adapters import WEIGHTS, copy_with
from tests.support.server import ONE_CORE, ONE_PROCESS, base_environment

pytestmark = pytest.mark.serving

ENGINE = """
import json, shutil, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, folder, other, *prompts = sys.argv[1:]
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
          max_lora_rank=16, max_num_seqs=8, max_loras=1, max_cpu_loras=1,
          distributed_executor_backend="@@")
params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5)

def ask(number, folder, name=None):
    answers = []
    for prompt in prompts:  # one at a time, as on the server
        adapter = LoRARequest(name or f"a{number}", number, folder)
        [out] = llm.generate(prompt, params, lora_request=adapter)
        answers.append([{t: v.logprob for t, v in p.items()} for p in out.prompt_logprobs if p])
    return answers
""".replace("@@", ONE_PROCESS)
ONCE = (
    ENGINE
    + """
print("ANSWERS", json.dumps(ask(1, folder)))
"""
)
PROGRAM = (
    ENGINE
    + """
found = [ask(1, folder)]
bad = folder + "-bad"
shutil.copytree(folder, bad)
config = Path(bad, "adapter_config.json")
config.write_text(config.read_text().replace("LORA", "IA3"))
found.append(ask(2, bad))
shutil.rmtree(folder)
found.append(ask(1, folder))  # the second adapter has evicted it

def first(number, folder, **more):  # the prefix cache may answer this
    adapter = LoRARequest(f"a{number}", number, folder, **more)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    [out] = llm.generate(" ".join(prompts * 6), params, lora_request=adapter)
    return {t: v.logprob for t, v in out.outputs[0].logprobs[0].items()}

shutil.copytree(other, folder)
found.append([first(1, folder), first(1, folder, load_inplace=True)])
found[-1] += [first(1, folder), first(3, other)]
shutil.rmtree(folder)
found[-1].append(first(1, folder))
found.append(ask(8, other, "y" * 257))

for number, own in ((4, folder + "-void"), (5, folder + "-void-too")):
    Path(own).mkdir()
    ask(number, own)
twin = other + "-twin"
shutil.copytree(other, twin)
for number, own in ((6, other), (7, twin), (6, other), (7, twin)):  # each evicts the one before
    ask(number, own)
print("ANSWERS", json.dumps(found))
"""
)


ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine in the program's own process: a start takes half as long."""


def generate(model, folder, other, program=PROGRAM, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(folder), str(other), *PROMPTS],
        env=base_environment() | ONE_CORE | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    return json.loads(line.removeprefix("ANSWERS ")), done.stdout + done.stderr


def assert_alike(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for place, other in zip(ours, theirs, strict=True):
            assert place == pytest.approx(other, abs=1e-5)


def test_adapters_first_used_offline_are_stripped_quarantined_and_reloaded_as_admitted(
    model, spiked, trained, expected, policy_file, tmp_path
):
    folder, other = (copy_with(each, tmp_path / name) for each, name in
                     ((spiked, "tenant"), (trained, "other")))  # fmt: skip
    audit = tmp_path / "audit.jsonl"
    variables = {"S3LORA_POLICY": str(policy_file), "S3LORA_AUDIT_LOG": str(audit)}
    found, log = generate(model, folder, other, **variables)
    assert_alike(found[0], expected["by-hand"])
    assert_alike(found[1], expected["base"])
    assert_alike(found[2], expected["by-hand"])
    assert "ERROR" in log
    assert "'a2' is quarantined, it answers as the base: S3LORA-103" in log
    # New content in the folder is read when loaded in place; no old cache block is used then.
    before, replaced, after, of_new_content, deleted = found[3]
    assert before != pytest.approx(of_new_content, abs=1e-3)
    for answer in (replaced, after, deleted):
        assert answer == pytest.approx(of_new_content, abs=1e-4)
    assert_alike(found[4], expected["base"])  # its name is too long
    assert f"'{'y' * 256}' is quarantined, it answers as the base: S3LORA-221" in log
    # What was refused or is shared is told with each registrant's own name and path.
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    for name, own in (("a4", f"{folder}-void"), ("a5", f"{folder}-void-too")):
        assert f"{name!r} is quarantined, it answers as the base: S3LORA-101: {own} has no" in log
        told = [line["path"] for line in entries if line["adapter"] == name]
        assert set(told) == {own}
    again = {line["adapter"]: line["path"] for line in entries if line["door"] == "reload"}
    assert (again["a6"], again["a7"]) == (str(other), f"{other}-twin")


def test_a_restarted_engine_serves_what_was_admitted_though_its_folder_is_gone(
    model, spiked, trained, expected, policy_file, tmp_path
):
    folder, log = copy_with(spiked, tmp_path / "tenant"), tmp_path / "audit.jsonl"
    variables = {
        "S3LORA_POLICY": str(policy_file),
        "S3LORA_STATE_DIR": str(tmp_path / "state"),
        "S3LORA_AUDIT_LOG": str(log),
    }
    first, _ = generate(model, folder, trained, ONCE, **ALONE, **variables)
    decided = len(log.read_text().splitlines())
    assert decided == 1
    shutil.rmtree(folder)
    [weights] = (tmp_path / "state").glob(f"s3lora-*/*/{WEIGHTS}")
    stored = weights.parent
    again, _ = generate(model, stored, trained, ONCE, **ALONE, **variables)
    assert again == first
    assert_alike(again, expected["by-hand"])
    assert len(log.read_text().splitlines()) == decided  # no second scoring or decision


def test_an_engine_with_a_bad_policy_does_not_start(model, spiked):
    with pytest.raises(AssertionError, match="S3LORA-901"):
        generate(model, spiked, spiked, S3LORA_POLICY="/nowhere.yaml")


@pytest.mark.slow  # as with a bad policy, by another variable
def test_an_engine_with_a_bad_setting_does_not_start(model, spiked):
    with pytest.raises(AssertionError, match="S3LORA_MODE='sometimes'"):
        generate(model, spiked, spiked, S3LORA_MODE="sometimes")
