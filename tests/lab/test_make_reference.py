"""References hold the leading directions of W_aligned − W_base, in any layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3lora_serve.alignment.reference_file import read_reference
from s3lora_serve.errors import CheckpointUnfit
from s3lora_serve.lab.make_reference import ReferenceOptions, make_reference
from tests.support.references import CHECKPOINT, linear, realigned, reference_of, write_checkpoint

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def checkpoints(tmp_path):
    plain = linear(200, 150)
    aligned = realigned(plain)
    return write_checkpoint(tmp_path / "base", plain), write_checkpoint(tmp_path / "new", aligned)


def _differences(base, aligned):
    before, after = load_file(base / CHECKPOINT), load_file(aligned / CHECKPOINT)
    return {
        name.removesuffix(".weight"): after[name] - before[name]
        for name in before
        if "q_proj" in name
    }


@pytest.mark.parametrize("exact", [True, False])
def test_reference_holds_the_leading_directions_of_the_difference(checkpoints, tmp_path, exact):
    file = reference_of(*checkpoints, tmp_path / "r.safetensors", rank=12, exact=exact)
    reference = read_reference(file)
    differences = _differences(*checkpoints)
    assert reference.subspaces.keys() == differences.keys()
    for name, V in differences.items():
        left, values, _ = torch.linalg.svd(V.double(), full_matrices=False)
        space = reference.subspaces[name]
        assert space.frobenius == pytest.approx(float(values.norm()), rel=1e-6)
        best = float(values[:12].square().sum() / values.square().sum())
        assert space.captured == pytest.approx(best, rel=1e-5)
        assert torch.allclose(space.singular_values, values[:12], rtol=1e-3)
        C = (left[:, :12] * values[:12].square()) @ left[:, :12].T
        found = (space.U.double() * space.singular_values.square()) @ space.U.double().T
        assert torch.allclose(found, C, atol=1e-5 * float(values[0]) ** 2)


def test_sharded_checkpoints_give_the_same_reference(checkpoints, tmp_path):
    base, aligned = checkpoints
    whole = reference_of(base, aligned, tmp_path / "whole.safetensors", rank=4)
    weights = load_file(aligned / CHECKPOINT)
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(shards.values()):
        save_file({n: weights[n] for n in weights if shards[n] == file}, aligned / file)
    (aligned / CHECKPOINT).unlink()
    (aligned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    parts = reference_of(base, aligned, tmp_path / "parts.safetensors", rank=4)
    one, other = read_reference(whole), read_reference(parts)
    assert one.about.aligned_digest != other.about.aligned_digest
    for name, space in one.subspaces.items():
        assert torch.equal(space.U, other.subspaces[name].U)


class _Stopped(Exception):
    pass


def test_interrupted_run_goes_on_where_it_was_and_writes_the_same_bytes(checkpoints, tmp_path):
    options = ReferenceOptions(rank=6)
    make_reference(*checkpoints, tmp_path / "once.safetensors", options)
    target = tmp_path / "again.safetensors"
    made = []

    def stop(phase, done, total):
        if phase == "modules":
            made.append(done)
            if len(made) == 2:
                raise _Stopped

    with pytest.raises(_Stopped):
        make_reference(*checkpoints, target, options, progress=stop)
    assert not target.exists()
    [parts] = tmp_path.glob(".again*")
    kept = {file.name: file.stat().st_mtime_ns for file in parts.glob("[0-9]*")}
    assert len(kept) == 2
    seen = {}

    def note(phase, done, total):
        seen.update({f.name: f.stat().st_mtime_ns for f in parts.glob("[0-9]*")})

    make_reference(*checkpoints, target, options, resume=True, progress=note)
    assert {name: seen[name] for name in kept} == kept
    assert target.read_bytes() == (tmp_path / "once.safetensors").read_bytes()
    assert not parts.exists()


def test_parts_of_another_rank_are_not_taken_over(checkpoints, tmp_path):
    target = tmp_path / "r.safetensors"

    def stop(phase, done, total):
        if phase == "modules":
            raise _Stopped

    with pytest.raises(_Stopped):
        make_reference(*checkpoints, target, ReferenceOptions(rank=3), progress=stop)
    make_reference(*checkpoints, target, ReferenceOptions(rank=5), resume=True)
    assert read_reference(target).subspaces[FIRST].U.shape == (200, 5)


def test_modules_are_chosen_by_glob_and_embeddings_are_left_out(checkpoints, tmp_path):
    file = reference_of(*checkpoints, tmp_path / "r.safetensors", modules=("*layers.1.*",))
    assert set(read_reference(file).subspaces) == {"model.layers.1.self_attn.q_proj"}


def test_bfloat16_is_kept_where_it_stays_orthonormal_and_float32_elsewhere(tmp_path):
    plain = linear(512, 96, layers=1) | {"tiny.weight": torch.randn(6, 6)}
    base = write_checkpoint(tmp_path / "base", plain)
    aligned = write_checkpoint(tmp_path / "aligned", realigned(plain))
    file = reference_of(base, aligned, tmp_path / "r.safetensors", dtype="bfloat16")
    dtypes = {name: space.U.dtype for name, space in read_reference(file).subspaces.items()}
    assert dtypes == {FIRST: torch.bfloat16, "tiny": torch.float32}


def test_module_that_alignment_left_alone_is_held_as_unchanged(checkpoints, tmp_path):
    base, aligned = checkpoints
    weights = load_file(aligned / CHECKPOINT)
    weights[f"{FIRST}.weight"] = load_file(base / CHECKPOINT)[f"{FIRST}.weight"]
    save_file(weights, aligned / CHECKPOINT)
    reference = read_reference(reference_of(base, aligned, tmp_path / "r.safetensors"))
    space = reference.subspaces[FIRST]
    assert (space.frobenius, space.captured, space.truncation) == (0.0, 1.0, 0.0)


def _equal(base, aligned):
    save_file(load_file(base / CHECKPOINT), aligned / CHECKPOINT)


def _without_a_module(base, aligned):
    weights = load_file(base / CHECKPOINT)
    del weights[f"{FIRST}.weight"]
    save_file(weights, base / CHECKPOINT)


def _other_shape(base, aligned):
    weights = load_file(base / CHECKPOINT)
    weights[f"{FIRST}.weight"] = torch.zeros(200, 149)
    save_file(weights, base / CHECKPOINT)


def _nan(base, aligned):
    weights = load_file(base / CHECKPOINT)
    weights[f"{FIRST}.weight"][0, 0] = torch.nan
    save_file(weights, base / CHECKPOINT)


def _quantized(base, aligned):
    weights = load_file(aligned / CHECKPOINT)
    weights[f"{FIRST}.weight"] = weights[f"{FIRST}.weight"].to(torch.int8)
    save_file(weights, aligned / CHECKPOINT)


def _cut_short(base, aligned):
    file = aligned / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-100])


def _no_weights(base, aligned):
    (aligned / CHECKPOINT).unlink()


def _broken_index(base, aligned):
    (aligned / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def _index_of_a_missing_file(base, aligned):
    index = {"weight_map": {f"{FIRST}.weight": "gone.safetensors"}}
    (aligned / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_equal, "are equal in all 3 modules"),
        (_without_a_module, "no such module"),
        (_other_shape, r"\(200, 149\)"),
        (_nan, "NaN or Inf"),
        (_quantized, "not quantized"),
        (_cut_short, CHECKPOINT),
        (_no_weights, "no weight of a linear module"),
        (_broken_index, "not an index"),
        (_index_of_a_missing_file, "gone.safetensors"),
    ],
)
def test_checkpoints_that_cannot_be_compared_are_named_and_nothing_is_written(
    checkpoints, tmp_path, damage, said
):
    damage(*checkpoints)
    target = tmp_path / "r.safetensors"
    with pytest.raises(CheckpointUnfit, match=said):
        make_reference(*checkpoints, target, ReferenceOptions(rank=4))
    assert not target.exists()


def test_existing_file_is_never_replaced(checkpoints, tmp_path):
    target = tmp_path / "r.safetensors"
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        make_reference(*checkpoints, target, ReferenceOptions())
    assert target.read_text() == "mine"
