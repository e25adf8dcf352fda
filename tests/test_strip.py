"""Stripped adapters on disk: what is kept is kept bit for bit."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from s3lora_serve import Policy, scan_adapter, strip_adapter
from s3lora_serve.policy import Strip
from tests.support.adapters import CONFIG, WEIGHTS, copy_with, key, without
from tests.support.tiny_model import load_model

TWO = Policy(strip=Strip(top_k=2))


def test_kept_tensors_metadata_and_configuration_are_unchanged(trained, tmp_path):
    verdict = strip_adapter(trained, tmp_path / "out", TWO)
    before, after = load_file(trained / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    gone = {key(module, side) for module in verdict.stripped for side in "AB"}
    assert set(before) - set(after) == gone
    assert len(gone) == 4
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads(
        (trained / CONFIG).read_text()
    )
    with (
        safe_open(tmp_path / "out" / WEIGHTS, "pt") as new,
        safe_open(trained / WEIGHTS, "pt") as old,
    ):
        assert new.metadata() == old.metadata()


def test_peft_loads_it_and_stripped_modules_contribute_nothing(model, trained, tmp_path):
    verdict = strip_adapter(trained, tmp_path / "out", TWO)

    def zeroed(tensors):
        for module in verdict.stripped:
            tensors[key(module, "B")].zero_()

    reference = copy_with(trained, tmp_path / "zeroed", zeroed)
    tokens = torch.arange(3, 40)[None]
    outputs = []
    for folder in (tmp_path / "out", reference):
        base, _ = load_model(model)
        outputs.append(PeftModel.from_pretrained(base, folder)(input_ids=tokens).logits)
    assert torch.equal(*outputs)


def test_nothing_is_written_when_rejected_or_nothing_is_left(trained, tmp_path):
    one = "model.layers.0.mlp.up_proj"
    others = {module.name for module in scan_adapter(trained, TWO).modules} - {one}
    single = copy_with(trained, tmp_path / "single", without(others))
    assert strip_adapter(single, tmp_path / "out", TWO).decision == "rejected"
    everything = Policy(strip=Strip(threshold=0.0), limits={"max_stripped_fraction": 1.0})
    assert len(strip_adapter(trained, tmp_path / "out", everything).stripped) == 28
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["single"]


def test_an_existing_target_is_never_written_over(trained, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        strip_adapter(trained, tmp_path / "out", TWO)
