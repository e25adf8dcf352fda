"""Mixture of experts: each expert's projections are modules and are stripped one by one.

The CPU build has no kernels for LoRA on experts. The tests compare the kernels' input instead: the
buffers of the engine's slot, after a real engine has loaded, packed and activated the adapter.
"""

import pytest

from s3lora_serve import scan_adapter
from s3lora_serve.policy.file import read_policy
from tests.support.adapters import copy_with, key, spike
from tests.support.programs import run_program
from tests.support.server import ONE_CORE, ONE_PROCESS
from tests.support.tiny_mixtral import make_expert_adapter, make_mixtral

pytestmark = pytest.mark.serving

SPIKED = "model.layers.1.block_sparse_moe.experts.2.w1"
PROGRAM = """
import sys
from vllm import LLM
from vllm.lora.request import LoRARequest

def buffers(worker):
    import hashlib
    manager = worker.model_runner.lora_manager._adapter_manager
    slot = manager.lora_index_to_id.index(1)
    found = {}
    for name, layer in manager.modules.items():
        if hasattr(layer, "moe_config"):
            for side in ("w13_lora_a_stacked", "w13_lora_b_stacked",
                         "w2_lora_a_stacked", "w2_lora_b_stacked"):
                for part, stacked in enumerate(getattr(layer, side)):
                    for expert, tensor in enumerate(stacked[slot]):
                        digest = hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
                        zero = not tensor.any()
                        found[f"{name}.{expert}.{side}.{part}"] = "zero" if zero else digest
    return found

llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, enable_lora=True,
          max_lora_rank=8, max_num_seqs=4, max_loras=1,
          distributed_executor_backend=sys.argv[3])
assert llm.llm_engine.add_lora(LoRARequest("experts", 1, sys.argv[2]))
[found] = llm.collective_rpc(buffers)
import json
print("FOUND", json.dumps(found))
"""


def slot_buffers(model, folder, **environment):
    """Digests of the buffers of the experts in slot 1, and the log."""
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # `buffers` is a function of this process
    own = more | ONE_CORE | environment
    return run_program("-c", PROGRAM, model, folder, ONE_PROCESS, **own)


@pytest.fixture(scope="module")
def mixtral(workplace):
    return make_mixtral(workplace / "mixtral")


@pytest.fixture(scope="module")
def expert_adapter(mixtral, workplace):
    whole = make_expert_adapter(mixtral, workplace / "experts")
    return copy_with(whole, workplace / "experts-spiked", spike(SPIKED))


def test_single_experts_are_stripped_and_the_others_kept(
    mixtral, expert_adapter, workplace, tmp_path
):
    policy_file = workplace / "experts.yaml"
    policy_file.write_text("strip: {top_k: 3}\n")
    verdict = scan_adapter(expert_adapter, read_policy(policy_file))
    assert SPIKED in verdict.stripped
    assert len(verdict.stripped) == 3

    def set_b_to_zero(tensors):
        for module in verdict.stripped:
            tensors[key(module, "B")].zero_()

    by_hand = copy_with(expert_adapter, tmp_path / "by-hand", set_b_to_zero)
    expected, _ = slot_buffers(mixtral, by_hand, VLLM_PLUGINS="")
    found, log = slot_buffers(mixtral, expert_adapter, S3LORA_POLICY=str(policy_file))
    assert found == expected, log[-2000:]
    zeros = {name for name, digest in found.items() if digest == "zero"}
    assert len(zeros) == 3


def test_an_adapter_that_lacks_experts_is_quarantined_and_the_engine_continues(
    mixtral, expert_adapter, tmp_path
):
    def remove(tensors):
        for side in "AB":
            del tensors[key(SPIKED, side)]

    found, log = slot_buffers(mixtral, copy_with(expert_adapter, tmp_path / "lacking", remove))
    assert set(found.values()) == {"zero"}
    assert "'experts' is quarantined" in log
    assert "S3LORA-302" in log
