"""Modules without weights in any adapter of the batch are skipped; the results stay the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.adapters import copy_with, diverged, train_adapter, without
from tests.support.programs import run_program
from tests.support.server import ONE_CORE, TWO_RANKS, base_environment
from tests.support.tiny_model import LAYERS, PROJECTIONS

pytestmark = pytest.mark.serving

MODULES = {
    f"model.layers.{layer}.{'mlp' if projection in PROJECTIONS[4:] else 'self_attn'}.{projection}"
    for layer in range(LAYERS)
    for projection in PROJECTIONS
}
ENDS = {"embed_tokens", "lm_head"}
STRIPPED = {
    "ends": set(),  # nor any of its ENDS
    "whole": set(),
    "ten": set(sorted(MODULES)[::3]),
    "q-gate": {name for name in MODULES if name.endswith(("q_proj", "gate_proj"))},
    "k-down": {name for name in MODULES if name.endswith(("k_proj", "down_proj"))},
    "one-left": MODULES - {"model.layers.2.self_attn.k_proj"},
    "quarantined": MODULES,
    "changing": {name for name in MODULES if "layers.1" in name},
}
PATHS = {"PYTHONPATH": str(Path.cwd()), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Workers receive functions of the tests and must be able to import them."""

POLICY = "{strip: {threshold: 1.0}, on_uninformative: admit, on_unscorable: admit}"


@pytest.fixture(scope="module")
def ends(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "ends"
    return train_adapter(model, folder, seed=2, target_modules=[*PROJECTIONS, *sorted(ENDS)])


def engine(
    model, trained, ends, folder, workers=1, program=("-m", "tests.support.random_batches"), **env
):
    folders = []
    for name, stripped in STRIPPED.items():
        change = diverged if name == "quarantined" else without(stripped)
        source = ends if name == "ends" else trained
        folders.append(copy_with(source, folder / name, change))
    (folder / "policy.yaml").write_text(POLICY)
    settings = {"S3LORA_POLICY": str(folder / "policy.yaml"), "S3LORA_STATE_DIR": str(folder)}
    own = ONE_CORE if workers == 1 else {}
    return run_program(*program, model, workers, *folders, **own, **settings, **PATHS, **env)


@pytest.fixture(scope="module")
def skipping(model, trained, ends, tmp_path_factory):
    return engine(model, trained, ends, tmp_path_factory.mktemp("skipping"))


def assert_one_operation_for_each_module_with_weights(found):
    expected = {name: len(MODULES - stripped) for name, stripped in STRIPPED.items()}
    for name, slices in {**expected, "base": 0}.items():
        for of_worker in found["each pass"][name]:
            assert of_worker == [slices, len(ENDS) if name == "ends" else 0], name


def test_a_pass_takes_one_operation_for_each_module_with_weights(skipping):
    found, log = skipping
    assert_one_operation_for_each_module_with_weights(found)
    assert "modules without weights are skipped" in log


def test_random_batches_give_the_same_answers_with_and_without_skipping(skipping):
    batches = skipping[0]["batches"]
    assert batches["passes"] >= 2 * 200
    assert max(batches["differences"]) <= 1e-5
    ours, theirs = batches["slices"]
    assert ours < 0.8 * theirs


def test_random_operations_give_the_same_bits_with_and_without_skipping(skipping):
    for linear, ends in skipping[0]["operations"]:
        assert linear["different"] == ends["different"] == 0
        assert linear["skipped"] >= 100
        assert 30 <= ends["skipped"] < 200, "only one of the adapters has weights for ENDS"


def test_no_adapter_touches_the_rows_of_base_requests_beside_it(skipping):
    for found in skipping[0]["operations"]:
        assert [each["touched"] for each in found] == [0, 0]


@pytest.mark.slow
def test_vllms_operations_for_gpus_give_the_same_bits_with_and_without_skipping(model):
    pytest.importorskip("triton", reason="needs triton, whose interpreter runs them here")
    found, log = run_program("-m", "tests.support.gpu_operations", model, 25, **PATHS)
    assert "modules without weights are skipped" in log
    kinds = {"qkv_proj", "gate_up_proj", "down_proj", "embed_tokens", "logits"}
    assert set(found) == kinds
    for kind in found.values():
        assert kind["different"] == kind["touched"] == 0
    assert min(found[packed]["skipped"] for packed in ("qkv_proj", "gate_up_proj")) >= 2
    assert sum(found[end]["skipped"] for end in ("embed_tokens", "logits")) >= 1, found


@pytest.mark.parametrize("batch_invariant", ["0", "1"])
@pytest.mark.slow
def test_rows_of_ids_for_captured_graphs_give_the_same_bits_and_leave_idle_requests_alone(
    model, batch_invariant
):
    pytest.importorskip("triton", reason="needs triton, whose interpreter runs them here")
    more = PATHS | {"VLLM_BATCH_INVARIANT": batch_invariant}
    found, log = run_program("-m", "tests.support.captured_operations", model, 60, **more)
    assert "skipped in captured graphs" in log
    for kind in found["kinds"].values():
        assert kind["different"] == kind["touched"] == 0
    assert min(kind["exits"] for kind in found["kinds"].values()) >= 2, found
    assert set(found["emptied"]) == {-1}
    assert 0 in found["warming up"]  # as vLLM has it: time and memory of real adapters
    assert found["kept addresses"]
    assert not found["stale weights act"]


BROKEN = """
import runpy, sys
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
add = PunicaWrapperCPU.add_lora_linear
PunicaWrapperCPU.add_lora_linear = lambda self, *args, **more: add(self, *args, **more)
if __name__ == "__main__":
    from typer.testing import CliRunner
    from s3lora_serve.cli import app
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    print("DOCTOR", done.exit_code, done.output.replace("\\n", " "))
    sys.argv[0] = "random_batches"
    runpy.run_module("tests.support.random_batches", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("why", ["broken contract", "switched off"])
def test_without_skipping_the_gate_works_and_says_why(model, trained, ends, tmp_path, why):
    (tmp_path / "site").mkdir()
    (tmp_path / "broken.py").write_text(BROKEN)
    if why == "switched off":
        found, log = engine(model, trained, ends, tmp_path, S3LORA_SKIP_STRIPPED="0")
        assert "S3LORA_SKIP_STRIPPED is off" in log
    else:
        found, log = engine(model, trained, ends, tmp_path, program=(str(tmp_path / "broken.py"),))
        problem = "PunicaWrapperCPU.add_lora_linear takes"
        assert problem in log
        [doctor] = [line for line in log.splitlines() if line.startswith("DOCTOR ")]
        assert doctor.startswith("DOCTOR 0 ")
        assert problem in doctor
    assert found["skips"] == [False]
    for name, workers in found["each pass"].items():
        # vLLM itself skips all but the logits if no request of a batch has an adapter.
        assert workers == [[0, 1] if name == "base" else [len(MODULES), len(ENDS)]], name
    assert "'quarantined' is quarantined" in log


COMPILED = """
import sys
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.engine.skipping import Skipping

def config(**more):
    return EngineArgs(sys.argv[1], dtype="float32", max_model_len=64, **more).create_engine_config()

compiled, eager, adapters = config(), config(enforce_eager=True), config(enable_lora=True)
captured = config(enforce_eager=True)
captured.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
configs = (compiled, captured, eager, adapters)
print("EAGER", *(compat.runs_eagerly(each) for each in configs))
Skipping(wanted=True).activate(None, compiled)  # raises if it uses the manager, which is None
"""


def test_a_compiled_or_captured_model_is_left_alone_and_the_log_says_so(model):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(model)],
        env=base_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EAGER False False True True" in done.stdout  # LoRA on the CPU is never compiled
    assert "the model is compiled or captured in graphs" in done.stdout + done.stderr


@pytest.mark.slow
def test_two_ranks_skip_alike_and_give_the_same_answers(model, trained, ends, tmp_path):
    found, _ = engine(model, trained, ends, tmp_path, workers=2, **TWO_RANKS)
    assert found["skips"] == [True, True]
    assert_one_operation_for_each_module_with_weights(found)
    assert max(found["batches"]["differences"]) <= 1e-4
    for linear, ends_of_it in found["operations"]:
        assert linear["different"] == ends_of_it["different"] == 0
        assert linear["skipped"] >= 100
