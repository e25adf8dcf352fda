"""The low-rank form agrees with the dense definition."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import (
    dense_reference,
    gram,
    low_rank,
    relative_sharpness,
    spectral_sharpness,
)
from s3lora_serve.spectral._checks import NORMALIZATIONS
from s3lora_serve.spectral.panels import HostModules
from tests.support.factors import HARD, gaussian

ACCURACY = 1e-6  # |SSI − dense float64|, from the spec
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def sharpness(module, B, A, scaling=None, **options):
    scaling = torch.ones(B.shape[0]) if scaling is None else scaling
    return spectral_sharpness(module.mas_svd(B, A, scaling, **options).singular_values)


def assert_same_index(found, expected, accuracy=ACCURACY):
    assert torch.equal(found.isnan(), expected.isnan())
    worst = (found - expected).abs().nan_to_num().max() if found.numel() else 0.0
    assert worst <= accuracy, f"SSI is off by {worst:.1e}"


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HARD)
def test_index_is_within_the_promised_accuracy_of_the_dense_definition(case, dtype, normalization):
    B, A = (factor.to(dtype) for factor in HARD[case]())
    found = sharpness(low_rank, B, A, normalization=normalization)
    assert_same_index(found, sharpness(dense_reference, B, A, normalization=normalization))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_spectrum_and_norms_include_the_scaling(normalization):
    B, A = gaussian(40, 30, 6, k=3)
    scaling = torch.tensor([2.0, -0.5, 16.0])
    found = low_rank.mas_svd(B, A, scaling, normalization=normalization)
    expected = dense_reference.mas_svd(B, A, scaling, normalization=normalization)
    for name in expected._fields:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0.0, msg=name
        )


def test_twins_share_name_and_signature():
    assert inspect.signature(low_rank.mas_svd) == inspect.signature(dense_reference.mas_svd)


def test_equal_norms_give_the_plain_singular_values():
    # All rows and columns of a Hadamard matrix have the same norm.
    hadamard = torch.tensor([[1.0]])
    for _ in range(3):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    B, A = hadamard[None, :, :1], hadamard[None, :1, :]
    spectrum = low_rank.mas_svd(B, A, torch.tensor([0.25])).singular_values
    plain = torch.linalg.svdvals((0.25 * B @ A).double())[:, :1]
    torch.testing.assert_close(spectrum, plain)


def test_rank_keeps_the_leading_values_and_the_index_uses_only_those():
    B, A = gaussian(40, 30, 8)
    full = low_rank.mas_svd(B, A, torch.ones(2)).singular_values
    leading = low_rank.mas_svd(B, A, torch.ones(2), rank=3).singular_values
    assert torch.equal(leading, full[:, :3])
    assert (spectral_sharpness(leading) > spectral_sharpness(full)).all()


def test_modules_that_gram_matrices_cannot_score_are_recognised():
    def bound(case, dtype):
        modules = list(zip(*HARD[case](), strict=True))
        sides = HostModules(modules).sides(range(len(modules)), dtype)
        return gram.solve(*sides, "two_sided").error_bound

    assert (bound("rank one, inner basis cancels", torch.float64) > gram.MAX_ERROR_BOUND).all()
    assert (bound("six decades in A", torch.float32) > gram.MAX_ERROR_BOUND).all()
    assert (bound("six decades in A", torch.float64) <= gram.MAX_ERROR_BOUND).all()


def test_one_bad_module_is_marked_and_does_not_affect_its_batch():
    B, A = gaussian(20, 15, 4, k=3)
    clean = low_rank.mas_svd(B, A, torch.ones(3))
    B[1, 0, 0], A[1, 2, 3] = torch.nan, torch.inf
    found = low_rank.mas_svd(B, A, torch.ones(3))
    for name in clean._fields:
        value, before = getattr(found, name), getattr(clean, name)
        assert value[1].isnan().all()
        torch.testing.assert_close(value[[0, 2]], before[[0, 2]])


def test_zero_update_has_no_index():
    B, A = HARD["zero update"]()
    spectrum = low_rank.mas_svd(B, A, torch.ones(2)).singular_values
    assert (spectrum == 0).all()
    assert spectral_sharpness(spectrum).isnan().all()


def test_rank_one_update_has_index_one():
    assert_same_index(sharpness(low_rank, *gaussian(50, 40, 1)), torch.ones(2).double(), 1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_isotropic_update_tends_to_one_over_r(normalization):
    gaps = []
    for size in (64, 256, 1024):
        index = sharpness(low_rank, *gaussian(size, size, 8), normalization=normalization)
        gaps.append(float((index - 1 / 8).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02


def test_relative_index_spans_zero_to_one_and_is_undefined_for_one_value():
    assert [relative_sharpness(index, 4) for index in (0.25, 1.0)] == [0.0, 1.0]
    assert math.isnan(relative_sharpness(1.0, 1))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 20), seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 0.5, 7.0, -3.0]), normalization=st.sampled_from(NORMALIZATIONS),
)  # fmt: skip
def test_index_ignores_scaling_inner_basis_and_order(m, n, r, seed, scale, normalization):
    B, A = gaussian(m, n, r, k=1, seed=seed)
    base = sharpness(low_rank, B, A, normalization=normalization)
    basis = torch.linalg.qr(gaussian(r, r, r, k=1, seed=seed + 1)[0])[0]
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)

    def again(b, a, s=1.0):
        return sharpness(low_rank, b, a, torch.tensor([s]), normalization=normalization)

    assert_same_index(again(B, A, scale), base)
    assert_same_index(again(B @ basis, basis.mT @ A), base)
    assert_same_index(again(B[:, rows], A[:, :, columns]), base)


@pytest.mark.parametrize(
    ("B", "A", "options", "words"),
    [
        ((2, 4, 3), (2, 2, 5), {}, "expected B"),
        ((2, 4, 3), (1, 3, 5), {}, "expected B"),
        ((4, 3), (3, 5), {}, "expected B"),
        ((2, 4, 3), (2, 3, 5), {"rank": 0}, "expected rank"),
        ((2, 4, 3), (2, 3, 5), {"normalization": "both"}, "expected a normalization"),
    ],
)
@pytest.mark.parametrize("twin", [low_rank, dense_reference])
def test_factors_that_do_not_fit_are_refused_with_their_shapes(twin, B, A, options, words):
    with pytest.raises(ValueError, match=words):
        twin.mas_svd(torch.ones(B), torch.ones(A), torch.ones(2), **options)
