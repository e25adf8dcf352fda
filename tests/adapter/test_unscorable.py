"""Tensors for which the index is not defined are rejected, served unscored, or removed."""

import pytest
import torch
from safetensors.torch import load_file

from s3lora_serve import Policy, scan_adapter, strip_adapter
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from tests.support.adapters import WEIGHTS, copy_with

EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
HEAD = "base_model.model.score.weight"


def adding(name, value=1.0):
    return lambda tensors: tensors.update({name: torch.full((4, 3), value)})


def policy(on_unscorable):
    return Policy(strip=Strip(top_k=2), on_unscorable=on_unscorable)


@pytest.mark.parametrize("name", [EMBEDDING, MAGNITUDE, HEAD])
def test_it_is_refused_unless_the_policy_says_otherwise(trained, tmp_path, name):
    folder = copy_with(trained, tmp_path / "with", adding(name))
    verdict = scan_adapter(folder, policy("reject"))
    assert verdict.reason.code == "S3LORA-110"
    admitted = scan_adapter(folder, policy("admit"))
    assert admitted.decision == "stripped"
    assert admitted.unscored == (name,)
    assert admitted.removed == ()


@pytest.mark.parametrize(("name", "defined"), [(EMBEDDING, True), (HEAD, True), (MAGNITUDE, False)])
def test_it_is_removed_where_the_rest_keeps_its_meaning(trained, tmp_path, name, defined):
    folder = copy_with(trained, tmp_path / "with", adding(name))
    verdict = strip_adapter(folder, tmp_path / "stripped", policy("strip"))
    if not defined:
        assert verdict.reason.code == "S3LORA-110"
        return
    assert verdict.removed == (name,)
    remaining = load_file(tmp_path / "stripped" / WEIGHTS)
    assert name not in remaining
    assert len(remaining) == len(load_file(folder / WEIGHTS)) - 1 - 2 * len(verdict.stripped)


def test_it_must_be_finite_even_where_it_is_admitted(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "with", adding(EMBEDDING, float("inf")))
    assert scan_adapter(folder, policy("admit")).reason.code == "S3LORA-109"


@pytest.mark.parametrize("setting", ["use_dora", "modules_to_save"])
def test_settings_that_request_it_are_treated_alike(trained, tmp_path, setting):
    value = True if setting == "use_dora" else ["score"]
    folder = copy_with(trained, tmp_path / "with", **{setting: value})
    codes = {
        word: getattr(scan_adapter(folder, policy(word)).reason, "code", None)
        for word in ("reject", "strip", "admit")
    }
    strip = "S3LORA-110" if setting == "use_dora" else None
    assert codes == {"reject": "S3LORA-110", "strip": strip, "admit": None}


def test_ranks_too_small_to_be_ranked_can_be_refused(trained):
    limits = Limits(min_rank=9)
    verdict = scan_adapter(trained, Policy(limits=limits))
    assert verdict.reason.code == "S3LORA-201"
    assert "min_rank 9" in verdict.reason.message


def test_numbers_that_nothing_serves_are_refused(trained, tmp_path):
    def widen(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name].double()
        tensors[name][0, 0] = 1e200

    verdict = scan_adapter(copy_with(trained, tmp_path / "wide", widen), policy("reject"))
    assert verdict.reason.code == "S3LORA-109"


@pytest.mark.parametrize("word", ["admit", "strip", "reject"])
def test_an_embeddings_factors_cannot_stand_in_for_a_scored_modules(trained, tmp_path, word):
    # vLLM reads lora_embedding_B as the lora_B of the module of that name.
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_B"
    folder = copy_with(trained, tmp_path / "with", adding(name))
    verdict = scan_adapter(folder, policy(word))
    assert verdict.reason.code == ("S3LORA-110" if word == "reject" else "S3LORA-111")
