"""Adapters as PEFT and other tools write them: read as vLLM reads them, or refused by name."""

import json

import pytest
import torch
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter, strip_adapter
from s3lora_serve.cli import app
from s3lora_serve.policy.method import Strip
from tests.support.adapters import cast, copy_with, renamed
from tests.support.plans import read


def scores(verdict):
    assert verdict.reason is None
    return [(module.name, module.ssi, module.spectrum) for module in verdict.modules]


def test_an_adapter_that_was_wrapped_twice_is_read_as_if_wrapped_once(trained, tmp_path):
    double = copy_with(trained, tmp_path / "double", renamed(lambda n: f"base_model.model.{n}"))
    assert scores(scan_adapter(double, Policy())) == scores(scan_adapter(trained, Policy()))


def test_one_module_under_both_prefixes_is_refused(trained, tmp_path):
    def twice(tensors):
        own = dict(tensors)
        tensors.update((f"base_model.model.{name}", t.clone()) for name, t in own.items())

    both = copy_with(trained, tmp_path / "both", twice)
    assert scan_adapter(both, Policy()).reason.code == "S3LORA-111"


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens"])
def test_weights_of_the_base_model_are_left_out_and_the_verdict_says_so(trained, tmp_path, layer):
    name = f"base_model.model.{layer}.base_layer.weight"

    def beside(tensors):
        tensors[name] = torch.full((8, 4), float("nan"))  # vLLM does not look at it either

    verdict = scan_adapter(copy_with(trained, tmp_path / "resized", beside), Policy())
    assert scores(verdict) == scores(scan_adapter(trained, Policy()))
    assert verdict.left_out == (name,)


def test_another_base_layer_is_not_left_out(trained, tmp_path):
    def beside(tensors):
        tensors["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"] = torch.ones(8, 4)

    verdict = scan_adapter(copy_with(trained, tmp_path / "more", beside), Policy())
    assert verdict.reason.code == "S3LORA-110"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_scored_as_vllm_casts_them(trained, tmp_path, dtype):
    def rounded(tensors):
        tensors.update({n: t.to(dtype).to(torch.bfloat16) for n, t in tensors.items()})

    eight = copy_with(trained, tmp_path / "eight", cast(dtype))
    sixteen = copy_with(trained, tmp_path / "sixteen", rounded)
    assert scores(scan_adapter(eight, Policy())) == scores(scan_adapter(sixteen, Policy()))
    for one, other in zip(read(eight).modules, read(sixteen).modules, strict=True):
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)


def test_an_adapter_of_8_bits_is_stripped(trained, tmp_path):
    eight = copy_with(trained, tmp_path / "eight", cast(torch.float8_e4m3fn))
    verdict = strip_adapter(eight, tmp_path / "stripped", Policy(strip=Strip(top_k=2)))
    left = {module.name for module in read(tmp_path / "stripped").modules}
    assert left == {module.name for module in verdict.modules if not module.stripped}
    assert len(left) == len(verdict.modules) - 2


def untrained(tensors):
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()


@pytest.mark.parametrize("how", ["untrained", "alpha 0"])
def test_an_adapter_that_does_nothing_is_said_to_do_nothing(trained, tmp_path, how):
    if how == "untrained":
        folder = copy_with(trained, tmp_path / "a", untrained)
    else:
        folder = copy_with(trained, tmp_path / "a", lora_alpha=0)
    verdict = scan_adapter(folder, Policy())
    assert verdict.reason.code == "S3LORA-226"
    assert "every update of its 28 scored modules is 0" in str(verdict.reason)
    assert scan_adapter(folder, Policy(on_uninformative="admit")).decision == "admitted"


LAYOUTS = {
    "mlx": (lambda n: n.replace("base_model.model.", "").replace(".lora_A.weight", ".lora_a")
            .replace(".lora_B.weight", ".lora_b"), "mlx: transpose"),
    "compiled": (lambda n: f"_orig_mod.{n}", "torch.compile"),
    "state dict": (lambda n: n.replace(".weight", ".default.weight"), "save_pretrained"),
    "fsdp": (lambda n: f"_fsdp_wrapped_module.{n}._flat_param", "FSDP: gather"),
    "megatron": (lambda n: n.replace(".lora_A.", ".adapter.linear_in.")
                 .replace(".lora_B.", ".adapter.linear_out."), "Megatron"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_another_tool_is_refused_with_its_name_and_the_conversion(
    trained, tmp_path, layout
):
    change, said = LAYOUTS[layout]
    folder = copy_with(trained, tmp_path / "other", renamed(change))
    reason = scan_adapter(folder, Policy()).reason
    assert reason.code == "S3LORA-110"
    assert said in str(reason)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_an_initialisation_that_changes_the_base_model_is_refused_as_vllm_does(
    trained, tmp_path, init
):
    folder = copy_with(trained, tmp_path / "a", init_lora_weights=init)
    reason = scan_adapter(folder, Policy(on_unscorable="admit")).reason
    assert reason.code == "S3LORA-114"
    assert "path_initial_model_for_weight_conversion" in str(reason)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_of_the_adapter_alone_is_admitted(trained, tmp_path, init):
    folder = copy_with(trained, tmp_path / "a", init_lora_weights=init)
    assert scan_adapter(folder, Policy()).reason is None


def test_a_configuration_that_vllm_cannot_read_is_refused_by_the_scan_too(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["target_modules"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    reason = scan_adapter(folder, Policy()).reason
    assert (reason.code, "target_modules" in str(reason)) == ("S3LORA-103", True)


def test_tables_fold_long_names_where_they_are_not_on_a_terminal(trained, tmp_path):
    folder = copy_with(trained, tmp_path / ("tenant-" * 12))
    text = CliRunner().invoke(app, ["scan", str(folder)]).output
    shown = "".join(text.split("│")).replace("\n", "").replace(" ", "")
    assert "tenant-" * 12 in shown.replace("┃", "")
    for module in scan_adapter(folder, Policy()).stripped:
        assert module in shown


def test_sharded_weights_are_refused_with_the_cure(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "sharded")
    whole = folder / "adapter_model.safetensors"
    whole.rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert scan_adapter(folder, Policy()).reason.code == "S3LORA-101"
