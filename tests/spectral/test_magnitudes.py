"""Every number of a module's score agrees with the dense definition, by every route."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import (
    Factors,
    Scorer,
    dense_reference,
    gram,
    precision,
    relative_sharpness,
    score_modules,
    spectral_sharpness,
)
from s3lora_serve.spectral._checks import NORMALIZATIONS
from s3lora_serve.spectral.low_rank import with_magnitudes
from s3lora_serve.spectral.panels import FLOAT32_RANK, HostModules
from tests.support.factors import HARD
from tests.support.modules import modules

ACCURACY = 1e-6
"""For the index, from the spec; for a spectrum, relative to its sum; for norms, relative.
float32 sums have a relative error of at most 2e-7 (measured over 1,500 modules), others 1e-14."""

ROUTES = ["float32 Grams", "float64 Grams", "QR", "precision"]


def solved(route, B, A, normalization):
    """The solution by one route, or None if its error bound is over MAX_ERROR_BOUND."""
    if route == "precision":
        return precision.solve([(B, A)], normalization)
    if route == "QR":
        return precision._solve_by_qr([(B, A)], normalization, lambda: None)
    dtype = torch.float32 if route == "float32 Grams" else torch.float64
    if dtype == torch.float32 and B.shape[1] < FLOAT32_RANK:
        return None
    solution = gram.solve(*HostModules([(B, A)]).sides([0], dtype), normalization)
    return solution if bool((solution.error_bound <= gram.MAX_ERROR_BOUND).all()) else None


def assert_same_spectrum(found, expected):
    total = expected.singular_values.sum(-1, keepdim=True)
    torch.testing.assert_close(
        found.singular_values / torch.where(total > 0, total, 1.0),
        expected.singular_values / torch.where(total > 0, total, 1.0),
        rtol=0.0, atol=ACCURACY, equal_nan=True,
    )  # fmt: skip
    for name in ("row_norm_mean", "column_norm_mean", "frobenius_norm"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=ACCURACY, atol=0.0, msg=name,
            equal_nan=True,
        )  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_spectrum_and_norms_are_those_of_the_dense_update(route, data):
    # Equilibrating takes too many sweeps for the error bound of float32 Grams.
    choices = [n for n in NORMALIZATIONS if (route, n) != ("float32 Grams", "equilibrated")]
    normalization = data.draw(st.sampled_from(choices))
    B, A, scaling = data.draw(modules(route))
    solution = solved(route, B, A, normalization)
    assume(solution is not None)
    s = torch.tensor([scaling], dtype=torch.float64)
    expected = dense_reference.mas_svd(B[None], A[None], s, normalization=normalization)
    count = expected.singular_values.shape[1]
    assert_same_spectrum(with_magnitudes(solution, s, [count], normalization), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("case", HARD)
def test_hard_modules_have_the_dense_updates_spectrum_too(case, normalization):
    B, A = HARD[case]()
    for one in range(len(B)):
        solution = precision.solve([(B[one], A[one])], normalization)
        s = torch.ones(1, dtype=torch.float64)
        expected = dense_reference.mas_svd(B[[one]], A[[one]], s, normalization=normalization)
        count = expected.singular_values.shape[1]
        assert_same_spectrum(with_magnitudes(solution, s, [count], normalization), expected)


@settings(max_examples=60, deadline=None)
@given(
    found=st.lists(modules(), min_size=1, max_size=4),
    normalization=st.sampled_from(NORMALIZATIONS),
    rank=st.sampled_from([None, 1, 3]),
)
def test_every_field_of_a_score_is_that_of_the_dense_update(found, normalization, rank):
    named = [Factors(f"m{i}", *module) for i, module in enumerate(found)]
    for score, (name, B, A, s) in zip(
        score_modules(named, Scorer(rank=rank, normalization=normalization), device="cpu"),
        named,
        strict=True,
    ):
        scaling = torch.tensor([s], dtype=torch.float64)
        dense = dense_reference.mas_svd(
            B[None], A[None], scaling, rank=rank, normalization=normalization
        )
        count = dense.singular_values.shape[1]
        assert (score.name, len(score.spectrum), score.finite) == (name, count, True)
        norms = [score.row_norm_mean, score.column_norm_mean, score.frobenius_norm]
        assert norms == pytest.approx([v.item() for v in dense[1:]], rel=ACCURACY)
        total = dense.singular_values.sum().item()
        assert score.spectrum == pytest.approx(
            dense.singular_values[0].tolist(), abs=ACCURACY * total, rel=0
        )
        index = spectral_sharpness(dense.singular_values).item()
        if total == 0:
            assert score.ssi is score.relative_ssi is None
            continue
        assert score.ssi == pytest.approx(index, abs=ACCURACY)
        if count == 1:
            assert score.relative_ssi is None
        else:
            assert score.relative_ssi == pytest.approx(
                relative_sharpness(index, count), abs=2 * ACCURACY
            )
        # At these scales the squares of the factors' norms are still finite in float64.
        factors = B.double().norm() * A.double().norm()
        assert score.cancellation == pytest.approx(
            (factors * abs(s) / dense.frobenius_norm[0]).item(), rel=ACCURACY
        )
