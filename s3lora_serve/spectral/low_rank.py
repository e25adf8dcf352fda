"""MAS-SVD without ever forming ΔW: the Gram route, and QR for the modules it cannot vouch for."""

import torch
from torch import Tensor

from s3lora_serve.spectral import gram, orthogonal
from s3lora_serve.spectral._checks import check_factors
from s3lora_serve.spectral.result import Spectrum

GRAM_DOUBT = 1e-8
"""Largest error bound at which a Gram solution is taken; the promise is |SSI error| ≤ 1e-6, and
the bound leaves out constants of a few times r. Held by tests/spectral/test_low_rank.py."""


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
    Same name, signature and meaning as `reference.mas_svd`; |SSI − dense SSI| ≤ 1e-6.

    Shape: B (k, m, r), A (k, r, n), scaling (k,); any floating dtype; all modules of one shape.
    Source: arXiv 2508.15068 (MAS-SVD), arXiv 2402.09754 (spherical normalisation).

    Raises:
        ValueError: shapes, dtypes or options do not fit.
    """
    count = check_factors(B, A, scaling, rank, normalization)
    scaling = scaling.double()
    wide_b, wide_a = B.double(), A.double()
    finite = wide_b.isfinite().flatten(1).all(1) & wide_a.isfinite().flatten(1).all(1)
    finite &= scaling.isfinite()
    # NaN stops LAPACK for the whole batch: such modules are scored as zero and marked after.
    wide_b = torch.where(finite[:, None, None], wide_b, 0.0)
    wide_a = torch.where(finite[:, None, None], wide_a, 0.0)

    solution = gram.solve(wide_b, wide_a, normalization)
    doubtful = ~(solution.doubt <= GRAM_DOUBT)  # NaN doubt counts as doubt
    if doubtful.any():
        exact = orthogonal.solve(wide_b[doubtful], wide_a[doubtful], normalization)
        for kept, better in zip(solution, exact, strict=True):
            kept[doubtful] = better
    return _magnitudes(solution, scaling.abs(), finite, count, normalization)


def _magnitudes(
    solution: gram.Solution, scaling: Tensor, finite: Tensor, count: int, normalization: str
) -> Spectrum:
    """Give the solution for s = 1 its magnitudes: D⁺·ΔW·D⁺ goes with 1/s, the others not at all."""
    row_mean = _mean(solution.rows) * scaling
    column_mean = _mean(solution.columns) * scaling
    magnitude = {
        "two_sided": row_mean * _mean(solution.columns),
        "row": row_mean,
        "column": column_mean,
        "equilibrated": row_mean * column_mean,
    }[normalization]
    values = magnitude.unsqueeze(-1) * solution.normalised[:, :count]
    frobenius = solution.frobenius * scaling
    spectrum = (values, row_mean, column_mean, frobenius)
    marked = (torch.where(_like(finite, value), value, torch.nan) for value in spectrum)
    return Spectrum(*(value.cpu() for value in marked))


def _mean(norms: Tensor) -> Tensor:
    return norms.mean(-1) if norms.shape[-1] else norms.sum(-1)


def _like(flags: Tensor, value: Tensor) -> Tensor:
    return flags.unsqueeze(-1) if value.ndim == 2 else flags
