"""The bench's attack on repair trains with what the gate serves."""

import torch
from peft import PeftModel
from safetensors.torch import load_file

import s3lora_serve
from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.policy.method import RepairChoice, Strip
from s3lora_serve.policy.schema import Policy
from tests.runs.evidence.adaptive import PREFIX, _factors, served_as_repaired


def test_an_owner_learns_with_the_factors_that_the_gate_serves(chat, statistics, tmp_path):
    policy = Policy(
        strip=Strip(top_k=0), on_uninformative="admit", repair=RepairChoice(statistics=statistics)
    )
    s3lora_serve.strip_adapter(chat.adapter, tmp_path / "repaired", policy)
    served = load_file(tmp_path / "repaired" / "adapter_model.safetensors")
    model = LanguageModel.load(chat.base, dtype="float32")
    wrapped = PeftModel.from_pretrained(model.model, chat.adapter, is_trainable=True)
    layers = {name: each for name, each in wrapped.named_modules() if hasattr(each, "lora_A")}
    own = {name: [factor.detach().clone() for factor in _factors(layers[name])] for name in layers}
    assert layers
    with served_as_repaired(wrapped, statistics)():
        for name, layer in layers.items():
            assert name.startswith(PREFIX)
            for side, factor in zip("BA", _factors(layer), strict=True):
                expected = served[f"{name}.lora_{side}.weight"]
                assert torch.allclose(factor, expected, rtol=1e-4, atol=1e-6), (name, side)
    for name, layer in layers.items():
        assert all(map(torch.equal, _factors(layer), own[name]))
