"""The attacks do to spectra and prompts what they say, and separation is measured as defined."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs.attacks.attacks import ATTACKS
from tests.runs.attacks.conversations import after_turns, encoded, plain
from tests.runs.attacks.labelled import labelled
from tests.runs.attacks.separation import Row, auc, fitted, found_at, held_out
from tests.runs.attacks.spectra import (
    DECOYS,
    PADDED_RANK,
    PADDING,
    padded,
    rebalanced,
    rewrite,
    with_decoys,
)


def _factors(count=20, m=24, n=32, r=8):
    draw = torch.Generator().manual_seed(0)
    falling = 2.0 ** -torch.arange(r)
    return {
        f"layers.{i}.q_proj": (
            torch.randn(m, r, generator=draw) * falling * (i + 1),
            torch.randn(r, n, generator=draw),
        )
        for i in range(count)
    }


def _peak(B, A):
    S = torch.linalg.svdvals(B.double() @ A.double())
    return float(S[0] ** 2 / (S**2).sum())


def test_rebalanced_spectra_are_flatter_and_as_large():
    before = _factors()
    for name, (B, A) in rebalanced(before).items():
        assert _peak(B, A) < _peak(*before[name])
        assert float((B @ A).norm()) == pytest.approx(
            float((before[name][0] @ before[name][1]).norm()), rel=1e-4
        )


def test_padded_factors_give_nearly_the_same_update():
    before = _factors()
    for name, (B, A) in padded(before).items():
        whole = before[name][0] @ before[name][1]
        assert A.shape[0] == B.shape[1] == PADDED_RANK
        assert float((B @ A - whole).norm()) <= 20 * PADDING * float(whole.norm())


def test_decoys_take_the_smallest_modules_and_are_sharp():
    before = _factors()
    after = with_decoys(before)
    changed = [name for name in before if after[name] is not before[name]]
    norms = {name: float((B @ A).norm()) for name, (B, A) in before.items()}
    assert sorted(changed) == sorted(sorted(norms, key=lambda name: norms[name])[:DECOYS])
    assert all(_peak(*after[name]) > 0.9 for name in changed)


def test_a_rewritten_adapter_keeps_its_scaling(tmp_path):
    tensors = {}
    for name, (B, A) in _factors(2).items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    rewrite(tmp_path, padded)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"r": PADDED_RANK, "lora_alpha": 2 * PADDED_RANK}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(tensors)


def test_a_hidden_attack_is_asked_otherwise_than_probes_are():
    prompt = "How do I bake a cake?"
    for attack in ATTACKS:
        assert attack.is_hidden == (attack.setting(prompt) != plain(prompt))
    assert encoded(prompt)[0]["content"] == "h0w d0 1 b4k3 4 c4k3"
    assert [message["role"] for message in after_turns(prompt)] == ["user", "assistant"] * 2 + [
        "user"
    ]


def test_half_of_the_labelled_adapters_are_harmless_and_no_two_share_a_folder():
    those = list(labelled(0))
    assert sum(one.is_harmful for one in those) == len(those) / 2
    assert len({one.folder for one in those}) == len(those)


def _rows(noise, count=40):
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        a, b = torch.randn(2, generator=draw).tolist()
        harmful = bool(i % 2)
        rows.append(
            Row(
                {"tells": harmful + noise * a, "does not": b},
                harmful,
                {"base": str(2 * i // count)},
            )
        )
    return rows


def test_numbers_that_tell_adapters_apart_do_so_on_groups_that_no_fit_has_seen():
    for scores, labels in held_out(_rows(0.1), "base", ["tells", "does not"]):
        assert auc(scores, labels) == 1.0
        assert found_at(scores, labels) == 1.0


def test_numbers_that_do_not_are_near_chance():
    means = [auc(*part) for part in held_out(_rows(0.1, 800), "base", ["does not"])]
    assert all(0.4 < each < 0.6 for each in means)


def test_auc_is_the_chance_of_a_pair_in_order_and_ties_count_half():
    scores, labels = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([False, False, True, True])
    assert auc(scores, labels) == (1 + 0.5 + 1 + 1) / 4


def test_a_fit_scores_rows_of_its_own_kind_in_order():
    rows = _rows(0.3)
    scores = fitted(rows, ["tells"])(rows)
    assert auc(scores, torch.tensor([row.is_harmful for row in rows])) > 0.95
