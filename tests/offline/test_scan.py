"""Scanning adapter folders: valid ones are scored, invalid ones are rejected with their code."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from s3lora_serve.spectral import dense_reference, spectral_sharpness
from tests.conftest import SPIKED_MODULE
from tests.support.adapters import CONFIG, WEIGHTS, copy_with, key, train_adapter, without

MODULE = "model.layers.0.self_attn.q_proj"
TWO = Policy(strip=Strip(top_k=2))


def dense_index(folder: Path, module: str, scaling: float) -> float:
    tensors = load_file(folder / WEIGHTS)
    B, A = tensors[key(module, "B")], tensors[key(module, "A")]
    spectrum = dense_reference.mas_svd(B[None], A[None], torch.tensor([scaling]))
    return float(spectral_sharpness(spectrum.singular_values))


def set_tensor(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


def test_a_trained_adapter_is_scored_as_the_dense_definition_says(trained):
    verdict = scan_adapter(trained, TWO)
    assert verdict.decision == "stripped"
    assert len(verdict.modules) == 28
    for module in verdict.modules:
        assert module.ssi == pytest.approx(dense_index(trained, module.name, 2.0), abs=1e-6)
        assert len(module.spectrum) == module.rank == 8


def test_a_planted_direction_ranks_first(spiked):
    verdict = scan_adapter(spiked, Policy(strip=Strip(top_k=1)))
    assert verdict.stripped == (SPIKED_MODULE,)


def test_the_verdict_identifies_bytes_configuration_and_policy(trained):
    verdict = scan_adapter(trained, TWO)
    data = (trained / WEIGHTS).read_bytes()
    assert verdict.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    canonical = json.dumps(
        json.loads((trained / CONFIG).read_text()), sort_keys=True, separators=(",", ":")
    )
    assert verdict.config_digest == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    assert verdict.policy_digest == TWO.digest
    assert verdict.name == "trained"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_are_scored_as_stored(trained, tmp_path, dtype):
    def convert(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    folder = copy_with(trained, tmp_path / "converted", convert)
    for module in scan_adapter(folder, TWO).modules:
        assert module.ssi == pytest.approx(dense_index(folder, module.name, 2.0), abs=1e-6)


def test_float64_weights_are_scored_as_the_float32_that_is_served(trained, tmp_path):
    def widen(tensors):
        for name in tensors:
            tensors[name] = tensors[name].double()
            tensors[name][:, ::2] *= 1e-60

    def narrow(tensors):
        widen(tensors)
        for name in tensors:
            tensors[name] = tensors[name].float()

    wide = scan_adapter(copy_with(trained, tmp_path / "wide", widen), TWO)
    served = scan_adapter(copy_with(trained, tmp_path / "served", narrow), TWO)
    assert [m.spectrum for m in wide.modules] == [m.spectrum for m in served.modules]
    assert wide.stripped == served.stripped


def test_rslora_and_patterns_give_each_module_its_scaling(model, tmp_path):
    folder = train_adapter(
        model, tmp_path / "patterned", use_rslora=True, lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.v_proj": 4, r".*\.3\.self_attn.q_proj": 2},
        alpha_pattern={"o_proj": 32},
    )  # fmt: skip
    tensors = load_file(folder / WEIGHTS)
    for module in scan_adapter(folder, TWO).modules:
        rank = {"model.layers.1.self_attn.v_proj": 4, "model.layers.3.self_attn.q_proj": 2}.get(
            module.name, 8
        )
        alpha = 32 if module.projection == "o_proj" else 8
        assert module.rank == rank
        update = tensors[key(module.name, "B")].double() @ tensors[key(module.name, "A")].double()
        expected = float(alpha / math.sqrt(rank) * update.norm(dim=1).mean())
        assert module.row_norm_mean == pytest.approx(expected, rel=1e-9)


def test_modules_outside_the_selection_are_neither_scored_nor_stripped(trained):
    verdict = scan_adapter(trained, Policy(modules=("q_proj",), strip=Strip(fraction=1.0)))
    scored = {module.name for module in verdict.modules if module.ssi is not None}
    assert scored == {f"model.layers.{i}.self_attn.q_proj" for i in range(4)}
    assert len(verdict.modules) == 28
    assert set(verdict.stripped) < scored


def test_audit_mode_says_what_enforce_would_do(trained):
    enforce = scan_adapter(trained, TWO)
    audit = scan_adapter(trained, TWO.model_copy(update={"mode": "audit"}))
    assert (audit.decision, audit.stripped) == (enforce.decision, enforce.stripped)
    assert audit.mode == "audit"


A, B = key(MODULE, "A"), key(MODULE, "B")
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"
MAGNITUDE = f"base_model.model.{MODULE}.lora_magnitude_vector"


def first_row(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


def add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def cancel(tensors):
    """Add two large rank-one terms that cancel exactly and so hide the rest of the update."""
    tensors[A][0], tensors[B][:, 0] = 1e13, 1.0
    tensors[A][1], tensors[B][:, 1] = -1e13, 1.0


BAD_WEIGHTS = {
    "NaN": (set_tensor(A, first_row(math.nan)), "109"),
    "infinity": (set_tensor(B, first_row(math.inf)), "109"),
    "ranks that do not fit": (set_tensor(A, lambda t: t[:4]), "107"),
    "three dimensions": (set_tensor(A, lambda t: t[None]), "107"),
    "no columns": (set_tensor(A, lambda t: t[:, :0]), "107"),
    "integers": (set_tensor(A, lambda t: t.to(torch.int8)), "104"),
    "no A": (lambda tensors: tensors.pop(A), "108"),
    "no B": (lambda tensors: tensors.pop(B), "108"),
    "no modules": (lambda tensors: tensors.clear(), "108"),
    "a module twice": (add(f"{MODULE}.lora_A.weight", torch.ones(8, 128)), "111"),
    "an embedding": (add(EMBEDDING, torch.ones(8, 3)), "110"),
    "the prefix twice": (add(f"base_model.model.{A}", torch.ones(8, 128)), "111"),
    "escape codes in a name": (add(f"\x1b[31m{A}", torch.ones(8, 128)), "110"),
    "factors that cancel": (lambda tensors: cancel(tensors), "112"),
    "a DoRA magnitude": (add(MAGNITUDE, torch.ones(8)), "110"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_with_their_code(trained, tmp_path, case):
    change, code = BAD_WEIGHTS[case]
    verdict = scan_adapter(copy_with(trained, tmp_path / "bad", change), TWO)
    assert verdict.decision == "rejected"
    assert verdict.reason.code == f"S3LORA-{code}"
    assert verdict.modules == ()


BAD_CONFIG = {
    "another method": ({"peft_type": "IA3"}, "103"),
    "no rank": ({"r": None}, "103"),
    "rank zero": ({"r": 0}, "103"),
    "rank as text": ({"r": "8"}, "103"),
    "huge rank": ({"r": 10**400}, "103"),
    "alpha not finite": ({"lora_alpha": math.inf}, "103"),
    "huge alpha": ({"lora_alpha": 10**400}, "103"),
    "another rank than the tensors'": ({"r": 4}, "107"),
    "a lookahead in a pattern": ({"rank_pattern": {"(?=a)b": 8}}, "103"),
    "a backreference in a pattern": ({"alpha_pattern": {r"(a)\1": 8}}, "103"),
    "no pattern at all": ({"rank_pattern": {"*": 8}}, "103"),
    "more keys than modules": ({"alpha_pattern": {f"m{i}": 8 for i in range(2**15 + 1)}}, "103"),
    "401 expressions": ({"alpha_pattern": {f"m{i}$": 8 for i in range(401)}}, "103"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "110"),
    "QALoRA": ({"use_qalora": True}, "110"),
    "pattern with rank zero": ({"rank_pattern": {"q_proj": 0}}, "103"),
    "scaling over the limit": ({"lora_alpha": 8 * 65}, "201"),
    "DoRA": ({"use_dora": True}, "110"),
    "bias": ({"bias": "all"}, "110"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "110"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_configuration_is_refused_with_its_code(trained, tmp_path, case):
    changes, code = BAD_CONFIG[case]
    verdict = scan_adapter(copy_with(trained, tmp_path / "bad", **changes), TWO)
    assert verdict.decision == "rejected"
    assert verdict.reason.code == f"S3LORA-{code}"


def damage(name):
    def no_config(folder):
        (folder / CONFIG).unlink()

    def config_is_a_folder(folder):
        (folder / CONFIG).unlink()
        (folder / CONFIG).mkdir()

    def config_is_not_json(folder):
        (folder / CONFIG).write_bytes(b"\xff{")

    def config_is_a_list(folder):
        (folder / CONFIG).write_text("[]")

    def config_is_huge(folder):
        (folder / CONFIG).write_bytes(b" " * (2**20 + 1))

    def no_weights(folder):
        (folder / WEIGHTS).unlink()

    def pickle_in_place_of_weights(folder):
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")

    def truncated(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:-100])

    def empty(folder):
        (folder / WEIGHTS).write_bytes(b"")

    def a_pipe(folder):
        (folder / WEIGHTS).unlink()
        os.mkfifo(folder / WEIGHTS)

    def broken_link(folder):
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to("nowhere")

    return locals()[name]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("no_config", "101"), ("config_is_a_folder", "101"), ("config_is_not_json", "103"),
        ("config_is_a_list", "103"), ("config_is_huge", "201"), ("no_weights", "101"),
        ("pickle_in_place_of_weights", "102"), ("truncated", "104"), ("empty", "104"),
        ("a_pipe", "101"), ("broken_link", "101"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_with_their_code(trained, tmp_path, name, code):
    folder = copy_with(trained, tmp_path / "bad")
    damage(name)(folder)
    verdict = scan_adapter(folder, TWO)
    assert verdict.decision == "rejected"
    assert verdict.reason.code == f"S3LORA-{code}"
    json.dumps(verdict.as_json())


def test_sizes_and_ranks_over_the_limits_are_refused(trained):
    for limits in (Limits(max_bytes=1000), Limits(max_rank=4)):
        verdict = scan_adapter(trained, Policy(limits=limits))
        assert verdict.reason.code == "S3LORA-201"


def test_only_adapters_under_the_roots_are_read_links_resolved(trained, tmp_path):
    policy = TWO.model_copy(update={"limits": Limits(roots=(tmp_path,))})
    assert scan_adapter(trained, policy).reason.code == "S3LORA-106"
    (tmp_path / "link").symlink_to(trained)
    assert scan_adapter(tmp_path / "link", policy).reason.code == "S3LORA-106"
    inside = copy_with(trained, tmp_path / "inside")
    assert scan_adapter(inside, policy).decision == "stripped"
    assert scan_adapter(tmp_path / "inside" / ".." / "inside", policy).decision == "stripped"


def test_a_linked_configuration_does_not_leak_into_the_refusal(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "spy")
    (tmp_path / "secret.json").write_text('{"password": "hunter2"}')
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(tmp_path / "secret.json")
    verdict = scan_adapter(folder, TWO)
    assert verdict.reason.code == "S3LORA-103"
    assert "hunter2" not in verdict.reason.message


@pytest.mark.parametrize("path", ["loop", "null\0byte", "x" * 5000, "nowhere"])
def test_paths_that_lead_nowhere_are_rejected_verdicts(tmp_path, path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert scan_adapter(tmp_path / path, TWO).decision == "rejected"


def test_rules_match_the_real_path(trained, tmp_path):
    (tmp_path / "trusted").mkdir()
    rule = {"match": {"path": f"{tmp_path}/trusted/**"}, "strip": {"top_k": 0}}
    policy = Policy(strip=Strip(top_k=2), rules=[rule])
    inside = copy_with(trained, tmp_path / "trusted" / "a")
    outside = copy_with(trained, tmp_path / "b")
    assert scan_adapter(inside, policy).decision == "admitted"
    assert scan_adapter(tmp_path / "trusted" / ".." / "b", policy).decision == "stripped"
    assert scan_adapter(outside, policy).decision == "stripped"


def test_a_passed_deadline_rejects(trained):
    policy = TWO.model_copy(update={"limits": Limits(seconds=1e-9)})
    assert scan_adapter(trained, policy).reason.code == "S3LORA-402"


def test_a_failing_scorer_rejects(trained, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("s3lora_serve.admission.scoring.score_modules", fail)
    verdict = scan_adapter(trained, TWO)
    assert verdict.reason.code == "S3LORA-401"
    assert "out of luck" in verdict.reason.message


def test_a_selection_that_matches_nothing_rejects(trained):
    assert scan_adapter(trained, Policy(modules=("nothing",))).reason.code == "S3LORA-206"


def test_not_finite_modules_outside_the_selection_reject(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "bad", BAD_WEIGHTS["NaN"][0])
    assert scan_adapter(folder, Policy(modules=("up_proj",))).reason.code == "S3LORA-109"


def test_equal_modules_are_uninformative(trained, tmp_path):
    others = {f"model.layers.{i}.{p}" for i in range(4) for p in (
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip

    def change(tensors):
        without(others)(tensors)
        first = {s: tensors[key(MODULE, s)] for s in "AB"}
        for i in range(4):
            for s in "AB":
                tensors[key(f"model.layers.{i}.self_attn.q_proj", s)] = first[s].clone()

    verdict = scan_adapter(copy_with(trained, tmp_path / "same", change), TWO)
    assert verdict.reason.code == "S3LORA-204"
    assert verdict.uninformative
    assert verdict.stripped == ()


def test_policy_comes_from_the_environment_and_only_a_bad_policy_raises(
    trained, tmp_path, monkeypatch
):
    file = tmp_path / "policy.yaml"
    file.write_text("strip: {top_k: 3}")
    monkeypatch.setenv("S3LORA_POLICY", str(file))
    assert len(scan_adapter(trained).stripped) == 3
    file.write_text("strip: {top_k: x}")
    with pytest.raises(PolicyInvalid):
        scan_adapter(trained)


def test_a_file_saved_by_the_library_without_prefix_is_read(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "plain")
    tensors = load_file(folder / WEIGHTS)
    renamed = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    save_file(renamed, folder / WEIGHTS)
    names = [module.name for module in scan_adapter(folder, TWO).modules]
    assert names == [module.name for module in scan_adapter(trained, TWO).modules]
