"""Statistics from somebody else are read strictly: every malformed kind is refused."""

import pytest
import torch

from s3lora_serve.adapter.tensor_file import check_owner
from s3lora_serve.errors import StatisticsInvalid
from s3lora_serve.repair.statistics_file import read_statistics
from tests.support.statistics import RANK, rewritten
from tests.support.tensor_files import put, setting

SITE = "model.layers.0.self_attn.q_proj"


def _set(part, value):
    return setting(f"{SITE}.{part}", value)


TENSORS = {
    "NaN in a direction": (_set("V", lambda V: put(V, torch.nan, 0, 0)), "NaN or Inf"),
    "infinite eigenvalue": (_set("mu", lambda mu: put(mu, torch.inf, 0)), "NaN or Inf"),
    "negative eigenvalue": (
        _set("mu", lambda mu: put(mu, -1e-3, -1)),
        "negative, or do not fall",
    ),
    "eigenvalues that rise": (_set("mu", lambda mu: mu.flip(0)), "negative, or do not fall"),
    "not orthonormal": (_set("V", lambda V: V * 1.05), "not orthonormal"),
    "pairs exchanged": (_set("V", lambda V: V.flip(1)), "not orthonormal"),
    "fewer directions": (_set("U", lambda U: U[:, 1:]), "has V, U and mu of the shapes"),
    "other width": (_set("F", lambda F: F[1:]), "has F of the shape"),
    "a vector": (_set("V", lambda V: V[:, 0]), "has V, U and mu of the shapes"),
    "NaN in an output": (_set("Q", lambda Q: put(Q, torch.nan, 0, 0)), "NaN or Inf"),
    "outputs not orthonormal": (_set("Q", lambda Q: Q * 1.05), "not orthonormal"),
    "fewer outputs": (_set("Q", lambda Q: Q[:, 1:]), "has Q and gamma of the shapes"),
    "negative gradients": (
        _set("gamma", lambda gamma: put(gamma, -1e-3, -1)),
        "negative, or do not fall",
    ),
    "NaN in a shift": (_set("shift", lambda K: put(K, torch.nan, 0, 0)), "NaN or Inf"),
    "shift of other directions": (_set("shift", lambda K: K[:, 1:]), "has a shift of the shape"),
    "tensor missing": (lambda tensors: tensors.pop(f"{SITE}.F"), "lacks"),
    "surplus tensor": (lambda tensors: tensors.update(more=torch.ones(2)), "surplus"),
}


def _site(**fields):
    return lambda about: about["sites"][SITE].update(fields)


METADATA = {
    "unknown key": (lambda about: about.update(more=1), "metadata more"),
    "unknown version": (lambda about: about.update(version=2), "metadata version"),
    "no digest": (lambda about: about.update(base_digest="x"), "metadata base_digest"),
    "no sites": (lambda about: about.update(sites={}), "metadata sites"),
    "no harmful probes": (lambda about: about.update(probes=about["probes"][:1]), "probes"),
    "a negative ridge": (_site(ridge=-1), "ridge"),
    "no modules": (_site(outputs={}), "outputs"),
    "no shifts": (lambda about: about.update(shifts=False), "surplus"),
    "more than all": (_site(benign_captured=1.5), "benign_captured"),
    "a module of two sites": (
        lambda about: about["sites"][SITE]["outputs"].update(
            {"model.layers.1.self_attn.q_proj": {"gamma_rest": 1, "captured": 1, "energy": 1}}
        ),
        "belongs to two sites",
    ),
}


def test_statistics_hold_the_sites_that_modules_share(statistics):
    found = read_statistics(statistics)
    assert len(found.sites) == 8
    assert len(found.by_module) == 14
    shared = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert set(found.about.sites[SITE].outputs) == shared
    assert len({id(found.by_module[name]) for name in shared}) == 1
    assert found.sites[SITE].V.shape == (64, RANK)
    assert [probes.kind for probes in found.about.probes] == ["harmful", "benign", "benign"]


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_no_statistics_have_are_refused(statistics, tmp_path, case):
    change, problem = TENSORS[case]
    with pytest.raises(StatisticsInvalid, match=problem):
        read_statistics(rewritten(statistics, tmp_path / "s.safetensors", change))


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_no_statistics_have_is_refused(statistics, tmp_path, case):
    about, problem = METADATA[case]
    with pytest.raises(StatisticsInvalid, match=problem):
        read_statistics(rewritten(statistics, tmp_path / "s.safetensors", about=about))


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"not safetensors at all"])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "s.safetensors"
    file.write_bytes(content)
    with pytest.raises(StatisticsInvalid, match=r"s\.safetensors"):
        read_statistics(file)


def test_a_file_that_is_missing_or_has_another_digest_is_refused(statistics, tmp_path):
    with pytest.raises(StatisticsInvalid, match="No such file"):
        read_statistics(tmp_path / "missing")
    with pytest.raises(StatisticsInvalid, match="was expected"):
        read_statistics(statistics, expected="sha256:" + "0" * 64)


def test_a_file_that_others_can_write_is_not_trusted(statistics):
    check_owner(statistics)
    statistics.chmod(0o622)
    try:
        with pytest.raises(ValueError, match="0622"):
            check_owner(statistics)
    finally:
        statistics.chmod(0o644)
