"""Switching between arithmetics is safe: no error is larger than its error bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import gram, qr, spectral_sharpness
from s3lora_serve.spectral._checks import NORMALIZATIONS
from s3lora_serve.spectral.panels import FLOAT32_RANK, LONGEST_SUM, HostModules
from tests.support.factors import HARD, gaussian


def solve(modules, normalization, arithmetic):
    sides = HostModules(modules).sides(range(len(modules)), arithmetic)
    return gram.solve(*sides, normalization)


def orthonormal(X):
    return torch.linalg.qr(X)[0]


def decaying(B, A, decades):
    """Singular values of B over some decades, in a random orthogonal inner basis."""
    r = B.shape[-1]
    fall = torch.logspace(0, -decades, r, dtype=torch.float64)
    return orthonormal(B) * fall @ orthonormal(gaussian(r, r, r, k=len(B))[0]), A


def falling(B, A, decades):
    """Columns of B and rows of A whose norms decrease in different orders."""
    r = B.shape[-1]
    fall = torch.logspace(0, -decades, r, dtype=torch.float64)
    return B * fall, A * fall[torch.arange(r) * 7 % r][:, None]


def spiked(B, A, decades):
    return torch.cat([B[..., :1] * 10**decades, B[..., 1:]], -1), A


def scaled_rows(B, A, decades):
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(B.shape[1], 1, generator=generator, dtype=torch.float64)
    columns = torch.rand(A.shape[2], generator=generator, dtype=torch.float64)
    return B * 10 ** (-decades * rows), A * 10 ** (-decades * columns)


def outlier(B, A, decades):
    B = B.clone()
    B[:, 3] *= 10**decades
    return B, A


def one_column_cancels(B, A, decades):
    """Column 5 of A points along the weakest right singular vector of B and is long."""
    A = A.clone()
    weakest = torch.linalg.svd(B)[2][:, -1]
    A[:, :, 5] = weakest * A[:, :, 5].norm(dim=-1, keepdim=True) * 10**decades
    return B, A


FAMILIES = [decaying, falling, spiked, scaled_rows, outlier, one_column_cancels]


ARITHMETICS = [(torch.float32, 16), (torch.float32, 32), *((torch.float64, r) for r in (2, 4, 16))]


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    decades=st.floats(0, 6),
    seed=st.integers(0, 10**6),
    m=st.sampled_from([60, 200, 1000]),
    n=st.sampled_from([64, 300, 1000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    normalization=st.sampled_from(NORMALIZATIONS),
    arithmetic=st.sampled_from(ARITHMETICS),
)
def test_no_error_exceeds_its_error_bound(
    family, decades, seed, m, n, dtype, normalization, arithmetic
):
    arithmetic, r = arithmetic
    B, A = (X.to(dtype) for X in family(*gaussian(m, n, r, k=2, seed=seed), decades))
    found = solve(list(zip(B, A, strict=True)), normalization, arithmetic)
    exact = qr.solve(B.double(), A.double(), normalization)
    error = (spectral_sharpness(found.normalised) - spectral_sharpness(exact.normalised)).abs()
    bound = found.error_bound
    assert (error.nan_to_num() <= bound + 1e-12).all(), (error / bound, bound)


@pytest.mark.parametrize("case", HARD)
def test_error_bounds_of_hard_cases_cover_their_errors(case):
    B, A = HARD[case]()
    if not len(B):
        return
    exact = spectral_sharpness(qr.solve(B, A, "two_sided").normalised)
    for arithmetic in (torch.float32, torch.float64)[B.shape[-1] < FLOAT32_RANK :]:
        found = solve(list(zip(B, A, strict=True)), "two_sided", arithmetic)
        error = (spectral_sharpness(found.normalised) - exact).abs().nan_to_num()
        assert (error <= found.error_bound + 1e-12).all()


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gram_matrix_errs_by_less_than_its_unit(rank, dtype):
    X = gaussian(LONGEST_SUM, 1, rank, k=4)[0].to(dtype)
    exact = X.double().mT @ X.double()
    found = torch.bmm(X.float().mT, X.float()).double()
    # A common factor does not change the index: it cancels in a ratio of singular values.
    common = (found * exact).sum((1, 2)) / exact.square().sum((1, 2))
    error = torch.linalg.matrix_norm(found - common[:, None, None] * exact, 2)
    worst = (error / torch.linalg.matrix_norm(exact, 2)).max()
    assert worst <= gram.UNIT[torch.float32]


def test_well_conditioned_modules_take_the_fast_arithmetic():
    modules = list(zip(*gaussian(1000, 1000, 16, k=3), strict=True))
    assert (solve(modules, "two_sided", torch.float32).error_bound <= gram.MAX_ERROR_BOUND).all()


def test_backends_rank_alike_wherever_the_gap_exceeds_their_accuracy():
    B, A = gaussian(400, 300, 16, k=40)
    B[:, :, 0] *= torch.linspace(1.0, 3.0, 40, dtype=torch.float64)[:, None]
    modules = list(zip(B, A, strict=True))
    exact = spectral_sharpness(qr.solve(B, A, "two_sided").normalised)
    order = exact.argsort()
    for arithmetic in (torch.float32, torch.float64):
        found = solve(modules, "two_sided", arithmetic).normalised
        index = spectral_sharpness(found)[order]
        gaps = exact[order].diff()
        assert (index.diff()[gaps > 2e-6] > 0).all()


def test_float32_is_not_used_where_the_process_allows_lower_precision():
    place = HostModules(list(zip(*gaussian(60, 60, 16), strict=True)))
    assert place.arithmetics == (torch.float32, torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        assert place.arithmetics == (torch.float64,)
    finally:
        torch.set_float32_matmul_precision("highest")
