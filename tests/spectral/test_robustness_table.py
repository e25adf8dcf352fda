"""The order of the indices in the spec's table for updates with outliers (512 x 384, r = 16)."""

import pytest
import torch

from s3lora_serve.spectral import low_rank, spectral_sharpness
from tests.support.factors import gaussian


def update(spike=1.0, row=1.0, column=1.0, scales=False):
    B, A = gaussian(512, 384, 16, k=1, seed=3)
    B, A = torch.linalg.qr(B)[0], torch.linalg.qr(A.mT)[0].mT
    B[:, :, 0] *= spike
    if scales:
        generator = torch.Generator().manual_seed(5)
        B *= torch.randn(512, generator=generator).exp()[:, None]
        A *= torch.randn(384, generator=generator).exp()
    B[:, 100] *= row
    A[:, :, 100] *= column
    return B, A


def index(normalization, **options):
    if normalization == "svd":
        B, A = update(**options)
        return float(spectral_sharpness(torch.linalg.svdvals(B @ A)[:, :16]))
    spectrum = low_rank.mas_svd(*update(**options), torch.ones(1), normalization=normalization)
    return float(spectral_sharpness(spectrum.singular_values))


def test_plain_svd_calls_an_outlier_row_sharper_than_a_true_spike():
    assert index("svd", row=100.0) > index("svd", spike=5.0)


@pytest.mark.parametrize("outlier", [{"row": 100.0}, {"column": 100.0}, {"scales": True}])
def test_two_sided_ranks_a_true_spike_over_outliers_of_a_hundred(outlier):
    assert index("two_sided", **outlier) < index("two_sided", spike=5.0)


def test_two_sided_fails_at_outliers_of_ten_thousand_and_equilibrated_does_not():
    assert index("two_sided", row=1e4) > index("two_sided", spike=20.0)
    assert index("equilibrated", row=1e4) < index("equilibrated", spike=5.0)


def test_one_sided_normalisations_each_resist_their_own_side_only():
    assert index("row", row=1e4) < index("row", spike=5.0) < index("row", column=100.0)
    assert index("column", column=1e4) < index("column", spike=5.0) < index("column", row=100.0)


@pytest.mark.parametrize("normalization", ["svd", "two_sided", "row", "column", "equilibrated"])
def test_every_index_grows_with_the_spike(normalization):
    values = [index(normalization, spike=spike) for spike in (1.0, 5.0, 20.0)]
    assert values == sorted(values)
    assert values[0] < 0.9 * values[2]
