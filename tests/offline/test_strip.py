"""Stripped adapters on disk: the remaining tensors are unchanged bit for bit."""

import hashlib
import json

import pytest
import torch
from google.protobuf.json_format import Parse
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementProto
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter, strip_adapter
from s3lora_serve.cli import app
from s3lora_serve.offline.provenance import PROVENANCE_NAME
from s3lora_serve.policy.method import Strip
from tests.support.adapters import CONFIG, WEIGHTS, copy_with, diverged, key, without
from tests.support.tiny_model import load_model

TWO = Policy(strip=Strip(top_k=2))


def test_kept_tensors_and_metadata_are_unchanged_and_the_configuration_names_what_is_kept(
    trained, tmp_path
):
    verdict = strip_adapter(trained, tmp_path / "out", TWO)
    before, after = load_file(trained / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    removed = {key(module, side) for module in verdict.stripped for side in "AB"}
    assert set(before) - set(after) == removed
    assert len(removed) == 4
    assert all(torch.equal(before[name], after[name]) for name in after)
    config = json.loads((trained / CONFIG).read_text())
    names = [module.name for module in verdict.modules if not module.stripped]
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == config | {"target_modules": names}
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


def test_nothing_stripped_is_nothing_changed(trained, tmp_path):
    strip_adapter(trained, tmp_path / "out", Policy(strip=Strip(top_k=0)))
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("initialised", ["gaussian", "eva", "orthogonal", True, False])
def test_however_layers_are_initialised_the_stripped_ones_stay_the_base_models(
    model, trained, tmp_path, initialised
):
    """PEFT initialises a layer that is missing in the file."""
    source = copy_with(trained, tmp_path / "source", init_lora_weights=initialised)
    verdict = strip_adapter(source, tmp_path / "out", TWO)
    base, _ = load_model(model)
    weights = {name: base.get_submodule(name).weight.clone() for name in verdict.stripped}
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    for name, weight in weights.items():
        layer = loaded.base_model.model.get_submodule(name)
        assert not hasattr(layer, "lora_A")
        assert torch.equal(layer.weight, weight)
    layers = [name for name, layer in loaded.named_modules() if hasattr(layer, "lora_A")]
    assert len(layers) == len(verdict.modules) - len(verdict.stripped)


def test_the_configuration_no_longer_requests_what_was_removed(trained, tmp_path):
    source = copy_with(trained, tmp_path / "source", modules_to_save=["lm_head"])
    policy = TWO.model_copy(update={"on_unscorable": "strip"})
    strip_adapter(source, tmp_path / "out", policy)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] is None


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_its_provenance_is_an_in_toto_statement_of_both_sides(trained, tmp_path):
    verdict = strip_adapter(trained, tmp_path / "out", TWO)
    found = json.loads((tmp_path / "out" / PROVENANCE_NAME).read_text())
    Parse(json.dumps(found), StatementProto(), ignore_unknown_fields=False)
    Statement.copy_from_pb(Parse(json.dumps(found), StatementProto())).validate()
    for side, folder in (
        (found["subject"], tmp_path / "out"),
        (found["predicate"]["buildDefinition"]["resolvedDependencies"], trained),
    ):
        digests = {file["name"]: file["digest"]["sha256"] for file in side}
        assert digests == {name: digest(folder / name) for name in (CONFIG, WEIGHTS)}
    parameters = found["predicate"]["buildDefinition"]["externalParameters"]
    assert parameters["policyDigest"] == TWO.digest
    assert parameters["strippedModules"] == list(verdict.stripped)
    assert parameters["scorer"]["name"] == "mas-svd"


def run(*arguments):
    return CliRunner().invoke(app, ["strip", *map(str, arguments)])


def test_the_command_writes_once_and_says_what_is_gone(trained, tmp_path):
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    done = run(trained, tmp_path / "out")
    assert done.exit_code == 0
    assert "stripped" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        CONFIG, WEIGHTS, PROVENANCE_NAME,
    }  # fmt: skip
    again = run(trained, tmp_path / "out")
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert run(trained, trained).exit_code == 2
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before


def test_the_command_writes_nothing_of_what_is_refused(trained, tmp_path):
    bad = copy_with(trained, tmp_path / "bad", diverged)
    done = run(bad, tmp_path / "out")
    assert done.exit_code == 1
    assert "S3LORA-109" in done.stdout
    assert not (tmp_path / "out").exists()
    assert run("/nowhere", tmp_path / "out").exit_code == 2
    assert run(trained, tmp_path / "no" / "such" / "folder").exit_code == 2
    (tmp_path / "link").symlink_to("/nowhere")
    assert run(trained, tmp_path / "link").exit_code == 2


def test_a_disk_that_fills_up_leaves_no_partial_output(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "there")

    monkeypatch.setattr("s3lora_serve.offline.strip.statement", full)
    done = run(trained, tmp_path / "out")
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert list(tmp_path.iterdir()) == []
