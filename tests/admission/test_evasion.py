"""Evasions by an adapter's owner who knows the strip rule: those that fail and known limits.

docs/threat-model.md gives the figures of the limits. A limit test that fails shows an improvement.
"""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from s3lora_serve.spectral import Factors, Scorer, score_modules
from tests.support.adapters import (
    copy_with,
    key,
    make_nearly_rank_one,
    q_proj,
    spike,
    write_adapter,
)
from tests.support.factors import gaussian

PLANTED = "model.layers.2.self_attn.v_proj"
SHARES = json.loads((Path(__file__).parents[1] / "runs" / "evidence" / "shares.json").read_text())
LEAST_SHARE = min(
    at["least"]
    for adapter in SHARES.values()
    for at in adapter["shares"].values()
    if adapter["training"].get("optimizer") != "SGD"  # which PEFT's users hardly take
)
"""The smallest of any module of an adapter trained with AdamW: tests/runs/evidence/SHARES.md."""

EVERY_RULE = [{"top_k": 10}, {"fraction": 0.1}, {"threshold": 0.3}, {"outliers": 3.5}]


@pytest.fixture
def others(trained):
    return [m.name for m in scan_adapter(trained, Policy()).modules if m.name != PLANTED]


@pytest.fixture
def decoyed(trained, others, tmp_path):
    """Makes the trained adapter with one planted module and others replaced by decoys.

    A decoy's update is nearly rank 1, of `size` times the norm of the original update.
    """
    number = count()

    def make(how_many, size, factor=3.0):
        def change(tensors):
            spike(PLANTED, factor)(tensors)
            for module in others[:how_many]:
                make_nearly_rank_one(module, size)(tensors)

        return copy_with(trained, tmp_path / f"decoyed-{next(number)}", change)

    return make


@pytest.fixture
def decoyed_by_share(trained, others, decoyed, tmp_path):
    """Makes twelve decoys, each with this share of the other modules' Σ‖ΔW‖_F²."""

    def make(share):
        verdict = scan_adapter(decoyed(0, 1.0), Policy())
        energy = {module.name: module.energy_share for module in verdict.modules}
        rest = sum(energy[name] for name in energy.keys() - set(others[:12]))

        def change(tensors):
            spike(PLANTED, 3.0)(tensors)
            for module in others[:12]:
                make_nearly_rank_one(module, (share * rest / energy[module]) ** 0.5)(tensors)

        return copy_with(trained, tmp_path / f"share-{share}", change)

    return make


def outcome(folder, **policy):
    verdict = scan_adapter(folder, Policy(**policy))
    return verdict.decision.value, frozenset(verdict.stripped)


# Evasions that fail.


@pytest.mark.parametrize("factor", [3.0, 6.0], ids=["of the others' size", "20 times as large"])
@pytest.mark.parametrize("choice", EVERY_RULE, ids=str)
def test_twelve_tiny_decoys_do_not_protect_a_planted_module(decoyed, others, choice, factor):
    strip = Strip(**choice)
    _, alone = outcome(decoyed(0, 1.0, factor), strip=strip)
    verdict = scan_adapter(decoyed(12, 1e-4, factor), Policy(strip=strip))
    assert PLANTED in alone
    assert PLANTED in verdict.stripped
    assert {m.name for m in verdict.modules if m.negligible} == set(others[:12])
    assert set(others[:12]) <= set(verdict.stripped), "decoys as sharp are stripped, uncounted"
    assert sum(m.energy_share for m in verdict.modules) == pytest.approx(1.0)


@pytest.mark.parametrize("choice", EVERY_RULE, ids=str)
def test_decoys_of_a_hundred_thousandth_of_the_update_do_not_protect_a_planted_module(
    decoyed_by_share, others, choice
):
    verdict = scan_adapter(decoyed_by_share(1e-5), Policy(strip=Strip(**choice)))
    assert PLANTED in verdict.stripped
    assert {m.name for m in verdict.modules if m.negligible} == set(others[:12])


def test_no_module_of_a_trained_adapter_is_negligible(trained):
    verdict = scan_adapter(trained, Policy())
    assert not any(module.negligible for module in verdict.modules)
    assert min(module.energy_share for module in verdict.modules) > 10 * Policy().negligible


def test_the_default_negligible_share_is_at_most_a_tenth_of_the_smallest_measured():
    assert Policy().negligible <= 0.1 * LEAST_SHARE
    every = [at["least"] for adapter in SHARES.values() for at in adapter["shares"].values()]
    assert min(every) > Policy().negligible


def test_modules_switched_off_by_their_alpha_are_not_counted(trained, others, tmp_path):
    """With alpha_pattern 0, factors of any size and sharpness have no effect."""
    names = others[:12]

    def change(tensors):
        for module in names:
            make_nearly_rank_one(module, 1.0)(tensors)

    folder = copy_with(trained, tmp_path / "off", change, alpha_pattern=dict.fromkeys(names, 0))
    verdict = scan_adapter(folder, Policy(strip=Strip(top_k=3)))
    assert {m.name for m in verdict.modules if m.negligible} == set(names)
    assert all(m.ssi is None for m in verdict.modules if m.name in names)
    assert len(verdict.stripped) == 3


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_moving_scale_between_the_factors_and_alpha_changes_no_verdict(tmp_path_factory, data):
    """B·2^b, A·2^a and alpha·2^-(a+b), chosen per module, give the same update."""
    folder = tmp_path_factory.mktemp("moved")
    plain, moved, alphas = {}, {}, {}
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(6)]
    for i, name in enumerate(names):
        B, A = (factor[0].float() for factor in gaussian(40, 30, 4, k=1, seed=i))
        B[:, 0] *= 1 + i
        b, a = (data.draw(st.integers(-20, 20)) for _ in range(2))
        plain |= {key(name, "A"): A.clone(), key(name, "B"): B.clone()}
        moved |= {key(name, "A"): A * 2.0**a, key(name, "B"): B * 2.0**b}
        alphas[name] = 8 * 2.0 ** -(a + b)
    policy = Policy(strip=Strip(top_k=2), limits=Limits(max_scaling=None))
    verdicts = [
        scan_adapter(write_adapter(folder / str(i), tensors, alpha_pattern=pattern), policy)
        for i, (tensors, pattern) in enumerate(((plain, {}), (moved, alphas)))
    ]
    assert verdicts[0].stripped == verdicts[1].stripped
    for before, after in zip(verdicts[0].modules, verdicts[1].modules, strict=True):
        assert after.relative_ssi == pytest.approx(before.relative_ssi, abs=1e-6)
        assert after.energy_share == pytest.approx(before.energy_share, rel=1e-6)
        assert after.spectrum == pytest.approx(before.spectrum, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), r=st.integers(2, 16), extra=st.integers(1, 16),
    sharp=st.floats(1, 20), side=st.sampled_from("AB"),
)  # fmt: skip
def test_padding_with_directions_of_zero_never_makes_a_module_look_less_sharp(
    seed, r, extra, sharp, side
):
    """SSI is unchanged; the relative index, with a larger M, rises by ≤ (1 − SSI)/(r − 1)."""
    B, A = (factor[0] for factor in gaussian(60, 50, r, k=1, seed=seed))
    B[:, 0] *= sharp
    noise_b, noise_a = (factor[0] for factor in gaussian(60, 50, extra, k=1, seed=seed + 1))
    (noise_a if side == "A" else noise_b).zero_()
    padded = torch.cat([B, noise_b], 1), torch.cat([A, noise_a], 0)
    before, after = score_modules(
        [Factors("before", B, A, 1.0), Factors("after", *padded, 1.0)], device="cpu"
    )
    assert after.ssi == pytest.approx(before.ssi, abs=1e-6)
    assert after.spectrum[:r] == pytest.approx(before.spectrum, rel=1e-5)
    rise = after.relative_ssi - before.relative_ssi
    assert -2e-6 <= rise <= (1 - before.ssi) / (r - 1) + 2e-6


def _padded(seed, width, r, tiny):
    """`width` equal directions of a random 300 x 250 update, and r − width tiny ones."""
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(d, r, generator=generator, dtype=torch.float64) for d in (300, 250))
    B, A = torch.linalg.qr(B)[0], torch.linalg.qr(A)[0].mT
    fall = torch.cat([torch.ones(width), torch.full((r - width,), tiny)]).double()
    [score] = score_modules([Factors("m", B * fall, A, 1.0)], device="cpu")
    return score


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.integers(1, 4), r=st.integers(5, 16),
    tiny=st.floats(0, 1e-10),
)  # fmt: skip
def test_a_narrow_update_is_sharp_whatever_tiny_directions_pad_it(seed, width, r, tiny):
    """k equal of r directions, the others tiny: relative index (1/k − 1/r)/(1 − 1/r)."""
    bound = (1 / width - 1 / r) / (1 - 1 / r)
    # Normalising evens out the row and column norms too: about a tenth of the index at 300 x 250.
    assert _padded(seed, width, r, tiny).relative_ssi >= 0.85 * bound


# Known limits.


def test_tiny_directions_count_where_the_main_one_nearly_leaves_out_a_row_and_a_column():
    """Rows and columns are scaled to length 1, so an entry that both nearly leave out grows."""
    assert _padded(4, 1, 8, 0.0).relative_ssi > 0.85
    assert _padded(4, 1, 8, 1e-6).relative_ssi < 0.5


@pytest.mark.parametrize(
    ("choice", "protected"),
    [({"top_k": 10}, True), ({"fraction": 0.1}, True), ({"outliers": 3.5}, True),
     ({"threshold": 0.3}, False)],
    ids=str,
)  # fmt: skip
def test_limit_twelve_decoys_at_full_size_protect_a_planted_module(
    decoyed, others, choice, protected
):
    """The owner loses what the decoys had learnt: each decoy that uses up a strip is stripped."""
    decision, stripped = outcome(decoyed(12, 1.0), strip=Strip(**choice))
    assert decision == "stripped"
    assert (PLANTED not in stripped) == protected
    if protected:
        assert stripped <= set(others[:12])


@pytest.mark.parametrize("share", [2 * Policy().negligible, LEAST_SHARE], ids="{:.1e}".format)
def test_limit_decoys_over_the_bound_protect_a_planted_module(decoyed_by_share, others, share):
    """They are as large as modules of trained adapters are, or a tenth of that."""
    decision, stripped = outcome(decoyed_by_share(share), strip=Strip(top_k=10))
    assert decision == "stripped"
    assert stripped <= set(others[:12])


def test_limit_where_most_modules_are_decoys_outliers_finds_nothing(decoyed):
    """`threshold` rejects the adapter: more than max_stripped_fraction of it is sharp."""
    folder = decoyed(16, 1.0)
    assert outcome(folder, strip=Strip(outliers=3.5)) == ("admitted", frozenset())
    assert scan_adapter(folder, Policy(strip=Strip(threshold=0.3))).reason.code == "S3LORA-203"


def test_limit_two_equal_directions_written_with_rank_two_are_ranked_last(tmp_path):
    """SSI 0.5, relative index 0: `threshold` strips it and `limits.min_rank` rejects it."""
    tensors = {}
    for i in range(12):
        B, A = (factor[0].float() for factor in gaussian(64, 64, 16, k=1, seed=i))
        tensors |= q_proj(i, B, A)
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).repeat(32, 1)
    tensors |= q_proj(12, hadamard, hadamard.mT)
    narrow = "model.layers.12.self_attn.q_proj"
    folder = write_adapter(tmp_path / "narrow", tensors, r=16, rank_pattern={narrow: 2})
    found = {m.name: m for m in scan_adapter(folder, Policy()).modules}[narrow]
    assert (found.ssi, found.relative_ssi) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-6))
    assert narrow not in outcome(folder, strip=Strip(top_k=6))[1]
    assert narrow in outcome(folder, strip=Strip(threshold=0.3))[1]
    refused = scan_adapter(folder, Policy(limits=Limits(min_rank=8)))
    assert refused.reason.code == "S3LORA-201"


def test_limit_a_spike_on_few_rows_and_columns_hides_in_noise_on_the_others():
    """Offline, `scan --scorer svd` finds it by the plain singular values."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(d, generator=generator).double() for d in (512, 384))
    u[51:], v[38:] = 0, 0  # a tenth of each
    noise_b, noise_a = (factor[0] for factor in gaussian(512, 384, 15, k=1))
    size = 0.01 * torch.outer(u, v).norm() / (noise_b @ noise_a).norm()
    B = torch.cat([u[:, None], noise_b * size], 1)
    module = Factors("m", B, torch.cat([v[None], noise_a], 0), 1.0)
    ssi = {
        name: score_modules([module], Scorer(name=name), device="cpu")[0].ssi
        for name in ("mas-svd", "svd")
    }
    assert ssi["svd"] > 0.9
    assert ssi["mas-svd"] < 0.1
