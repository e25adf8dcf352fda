"""A reference from somebody else is read strictly: every malformed kind is refused."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from s3lora_serve.adapter.tensor_file import check_owner
from s3lora_serve.alignment.reference_file import METADATA_KEY, read_reference
from s3lora_serve.errors import ReferenceInvalid
from tests.support import tensor_files
from tests.support.references import small_reference
from tests.support.tensor_files import put, setting

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_reference(tmp_path_factory.mktemp("reference"))


rewritten = partial(tensor_files.rewritten, key=METADATA_KEY)
"""A copy of the reference with tensors and metadata changed."""


def _set(part, value):
    return setting(f"{FIRST}.{part}", value)


TENSORS = {
    "NaN in a direction": (_set("U", lambda U: put(U, torch.nan, 0, 0)), "NaN or Inf"),
    "infinite value": (_set("sigma", lambda s: put(s, torch.inf, 0)), "NaN or Inf"),
    "negative value": (
        _set("sigma", lambda s: put(s, -1e-3, 7)),
        "negative, or do not fall",
    ),
    "values that rise": (_set("sigma", lambda s: s.flip(0)), "negative, or do not fall"),
    "not orthonormal": (_set("U", lambda U: U * 1.001), "not orthonormal"),
    "directions that lean": (_set("U", lambda U: U + 2e-3 * U.roll(1, 1)), "not orthonormal"),
    "more energy than V": (_set("sigma", lambda s: s * 1.01), "more energy"),
    "fewer directions": (_set("U", lambda U: U[:, :7].clone()), r"has U \(24, 7\)"),
    "other rows": (
        _set("U", lambda _: torch.eye(25)[:, :8].clone().contiguous()),
        r"has U \(25, 8\)",
    ),
    "fewer values": (_set("sigma", lambda s: s[:7].clone()), r"sigma \(7,\)"),
    "values as a matrix": (_set("sigma", lambda s: s[:, None].clone()), r"sigma \(8, 1\)"),
    "integers": (_set("U", lambda U: U.to(torch.int8)), "has dtype"),
    "a module without values": (lambda t: t.pop(f"{FIRST}.sigma"), "lacks"),
    "a surplus tensor": (lambda t: t.update(other=torch.ones(2)), "surplus tensor other"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_malformed_tensors_are_refused(good, tmp_path, kind):
    change, said = TENSORS[kind]
    with pytest.raises(ReferenceInvalid, match=said) as refusal:
        read_reference(rewritten(good, tmp_path / "r.safetensors", change))
    assert refusal.value.code == "S3LORA-909"


METADATA = {
    "another version": lambda a: a.update(version=2),
    "a key too many": lambda a: a.update(note="hello"),
    "no digest": lambda a: a.pop("base_digest"),
    "rank 0": lambda a: a.update(rank=0),
    "no modules": lambda a: a.update(modules={}),
    "a shape of 0": lambda a: a["modules"][FIRST].update(shape=[0, 16]),
    "a negative norm": lambda a: a["modules"][FIRST].update(frobenius=-1.0),
    "an infinite norm": lambda a: a["modules"][FIRST].update(frobenius=float("inf")),
    "a module too few": lambda a: a["modules"].pop(FIRST),
    "another rank": lambda a: a.update(rank=9),
}


@pytest.mark.parametrize("kind", METADATA)
def test_malformed_metadata_is_refused(good, tmp_path, kind):
    with pytest.raises(ReferenceInvalid):
        read_reference(rewritten(good, tmp_path / "r.safetensors", about=METADATA[kind]))


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8, None])
def test_file_that_is_no_reference_is_refused(good, tmp_path, content):
    file = tmp_path / "r.safetensors"
    file.write_bytes(good.read_bytes()[:-3] if content is None else content)
    with pytest.raises(ReferenceInvalid):
        read_reference(file)


def test_plain_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "r.safetensors")
    with pytest.raises(ReferenceInvalid, match="metadata"):
        read_reference(tmp_path / "r.safetensors")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda _: None])
def test_path_that_is_no_regular_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "r")
    with pytest.raises(ReferenceInvalid):
        read_reference(tmp_path / "r")


def test_file_with_another_digest_than_expected_is_refused(good):
    with pytest.raises(ReferenceInvalid, match="was expected"):
        read_reference(good, expected="sha256:" + "0" * 64)


def test_file_that_others_can_write_is_not_trusted(good, tmp_path):
    file = tmp_path / "r.safetensors"
    file.write_bytes(good.read_bytes())
    file.chmod(0o600)
    check_owner(file)
    file.chmod(0o622)
    with pytest.raises(ValueError, match="0622"):
        check_owner(file)
