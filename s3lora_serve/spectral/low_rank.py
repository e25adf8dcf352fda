"""MAS-SVD in low-rank form, for a batch of modules of one shape. ΔW is never formed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s3lora_serve.spectral import precision
from s3lora_serve.spectral._checks import check_factors
from s3lora_serve.spectral.gram import Solution
from s3lora_serve.spectral.result import Spectrum


def mas_svd(
    B: Tensor,
    A: Tensor,
    scaling: Tensor,
    *,
    rank: int | None = None,
    normalization: str = "two_sided",
) -> Spectrum:
    """Magnitude-aware spherically normalised spectrum of `ΔW = s·B·A`, low-rank and exact.

    `σ̃_k = r̄ · c̄ · σ̂_k`, `σ̂² = eig(P·Q)` with `P = B̂ᵀB̂`, `Q = Â·Âᵀ`; ΔW is never formed.
    Same name, signature and result as `dense_reference.mas_svd`, with |SSI − dense SSI| ≤ 1e-6.

    Shape: B (k, m, r), A (k, r, n), scaling (k,); any floating dtype; all modules have one shape.
    Source: arXiv 2508.15068 (MAS-SVD), arXiv 2402.09754 (spherical normalisation).

    Raises:
        ValueError: a shape, dtype or option is invalid.
    """
    count = check_factors(B, A, scaling, rank, normalization)
    if not B.shape[0] or not count:
        empty = torch.zeros(B.shape[0], dtype=torch.float64)
        return Spectrum(empty.new_zeros(B.shape[0], count), empty, empty, empty)
    solution = precision.solve(list(zip(B, A, strict=True)), normalization)
    return with_magnitudes(solution, scaling, [count] * B.shape[0], normalization)


def with_magnitudes(
    solution: Solution, scaling: Tensor, counts: Sequence[int], normalization: str
) -> Spectrum:
    """Multiply solutions for s = 1 by their magnitudes, and cut each spectrum to its own M.

    D_ρ⁺·ΔW·D_γ⁺ scales with 1/s; the one-sided and the equilibrated X do not depend on s.
    Shape: scaling (k,) -> singular_values (k, max(counts)), zero beyond each count.
    """
    s = scaling.double().abs()
    means = {
        "two_sided": s * solution.row_mean * solution.column_mean,
        "row": s * solution.row_mean,
        "column": s * solution.column_mean,
        "equilibrated": s * s * solution.row_mean * solution.column_mean,
    }
    most = max(counts)
    inside = torch.arange(most) < torch.tensor(counts).unsqueeze(-1)
    values = means[normalization].unsqueeze(-1) * solution.normalised[:, :most]
    return Spectrum(
        torch.where(inside, values, 0.0),
        s * solution.row_mean,
        s * solution.column_mean,
        s * solution.frobenius,
    )
