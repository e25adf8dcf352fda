"""Every field of a module in a verdict agrees with the dense definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import ScorerChoice, Strip
from s3lora_serve.spectral import dense_reference, relative_sharpness, spectral_sharpness
from s3lora_serve.spectral._checks import NORMALIZATIONS
from tests.support.adapters import q_proj, write_adapter
from tests.support.modules import modules

ACCURACY = 1e-6
LIMITS = Limits(negative_alpha=True, max_scaling=None, max_stripped_fraction=1.0)


def dense(B, A, alpha, **options):
    """The dense definition on the served weights: float64 factors are served as float32."""
    B, A = (X.float() if X.dtype == torch.float64 else X for X in (B, A))
    s = torch.tensor([alpha / B.shape[1]], dtype=torch.float64)
    return dense_reference.mas_svd(B[None], A[None], s, **options)


@settings(max_examples=50, deadline=None)
@given(
    found=st.lists(modules(largest=100), min_size=2, max_size=5),
    normalization=st.sampled_from(NORMALIZATIONS),
    rank=st.sampled_from([None, 2]),
)
def test_every_field_of_a_verdict_is_that_of_the_dense_update(
    tmp_path_factory, found, normalization, rank
):
    tensors, ranks, alphas = {}, {}, {}
    for layer, (B, A, scaling) in enumerate(found):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors |= q_proj(layer, B, A)
        ranks[name], alphas[name] = B.shape[1], scaling * B.shape[1]
    folder = write_adapter(
        tmp_path_factory.mktemp("verdict") / "adapter", tensors,
        rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip
    policy = Policy(
        scorer=ScorerChoice(rank=rank, normalization=normalization), limits=LIMITS,
        strip=Strip(threshold=1.0), on_uninformative="admit",
    )  # fmt: skip
    verdict = scan_adapter(folder, policy)
    expected = [
        dense(*module[:2], alpha, rank=rank, normalization=normalization)
        for module, alpha in zip(found, alphas.values(), strict=True)
    ]
    if verdict.reason is not None:  # the drawn factors cancel; another test covers this
        assert verdict.reason.code == "S3LORA-112"
        return
    energies = [e.frobenius_norm.item() for e in expected]
    largest = max(energies)
    total = sum((e / largest) ** 2 for e in energies) if largest else 0.0
    by_name = {module.name: module for module in verdict.modules}
    for layer, ((B, A, _), truth) in enumerate(zip(found, expected, strict=True)):
        module = by_name[f"model.layers.{layer}.self_attn.q_proj"]
        count = truth.singular_values.shape[1]
        assert (module.layer, module.projection) == (layer, "q_proj")
        assert (module.shape, module.rank) == ((B.shape[0], A.shape[1]), B.shape[1])
        sum_of_all = truth.singular_values.sum().item()
        assert module.spectrum == pytest.approx(
            truth.singular_values[0].tolist(), rel=0, abs=ACCURACY * sum_of_all
        )
        assert module.row_norm_mean == pytest.approx(truth.row_norm_mean.item(), rel=ACCURACY)
        assert module.column_norm_mean == pytest.approx(truth.column_norm_mean.item(), rel=ACCURACY)
        share = (energies[layer] / largest) ** 2 / total if largest else 0.0
        assert module.energy_share == pytest.approx(share, rel=4 * ACCURACY)
        index = spectral_sharpness(truth.singular_values).item()
        assert (module.ssi is None) == math.isnan(index)
        if module.ssi is not None:
            assert module.ssi == pytest.approx(index, abs=ACCURACY)
        relative = relative_sharpness(index, count)
        assert (module.relative_ssi is None) == math.isnan(relative)
        if module.relative_ssi is not None:
            assert module.relative_ssi == pytest.approx(relative, abs=2 * ACCURACY)
        assert module.stripped == (module.name in verdict.stripped)
