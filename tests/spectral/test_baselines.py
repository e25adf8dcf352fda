"""The baselines compute the singular values and magnitudes that they are named after."""

import inspect

import pytest
import torch

from s3lora_serve.spectral import baselines, dense_reference, spectral_sharpness
from tests.support.factors import HARD, gaussian


@pytest.mark.parametrize("case", sorted(set(HARD) - {"no modules"}))
def test_svd_gives_the_singular_values_of_the_update(case):
    B, A = HARD[case]()
    scaling = torch.full((len(B),), -2.0)
    found = baselines.svd(B, A, scaling)
    count = found.singular_values.shape[1]
    expected = torch.linalg.svdvals(-2.0 * B @ A)[:, :count]
    bound = float(expected.max()) * 1e-12
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-9, atol=bound)
    torch.testing.assert_close(found.frobenius_norm, torch.linalg.matrix_norm(-2.0 * B @ A))


def test_spsvd_finds_the_magnitude_of_a_rank_one_update():
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 30, generator=generator, dtype=torch.float64)
    [[found]] = baselines.spsvd(u[None], v[None], torch.tensor([3.0])).singular_values
    assert float(found) == pytest.approx(3.0 * float(u.norm() * v.norm()), rel=1e-4)


def test_spsvd_takes_medians_and_is_not_moved_by_a_few_corrupted_entries():
    # One direction with equal rows and columns: 98 % of the entries of each median are clean.
    B, A = torch.ones(1, 50, 1), torch.ones(1, 1, 50)
    B = torch.cat([B, torch.zeros(1, 50, 1)], -1)
    A = torch.cat([A, torch.zeros(1, 1, 50)], 1)
    B[0, 3, 1], A[0, 1, 5] = 400.0, 1.0
    plain = baselines.svd(B, A, torch.ones(1)).singular_values[0, 0]
    robust = baselines.spsvd(B, A, torch.ones(1)).singular_values[0, 0]
    assert abs(float(robust) - 50) < 2
    assert float(plain) > 300


def test_baselines_are_called_like_every_scorer():
    signature = inspect.signature(dense_reference.mas_svd)
    assert inspect.signature(baselines.svd) == signature
    assert inspect.signature(baselines.spsvd) == signature


def test_a_spike_raises_every_index():
    B, A = gaussian(64, 48, 4, k=1, seed=2)
    sharp = B.clone()
    sharp[..., 0] *= 20
    for scorer in (baselines.svd, baselines.spsvd):
        flat, spiked = (
            float(spectral_sharpness(scorer(X, A, torch.ones(1)).singular_values))
            for X in (B, sharp)
        )
        assert spiked > flat + 0.1
