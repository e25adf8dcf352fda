"""Baselines for MAS-SVD, for offline use only: plain SVD in low-rank form, and dense SpSVD."""

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import ZERO_ROW, check_factors
from s3lora_serve.spectral.result import Spectrum

BLOCK_ROWS = 256
"""Rows of the dense update that `spsvd` forms at a time."""


def svd(
    B: Tensor,
    A: Tensor,
    scaling: Tensor,
    *,
    rank: int | None = None,
    normalization: str = "two_sided",
) -> Spectrum:
    """Singular values of the unnormalised ΔW = s·B·A, from thin QRs: `|s|·σ(R_B·R_Aᵀ)`.

    `normalization` has no effect; it exists so that all scorers have the same signature.

    Shape: B (k, m, r), A (k, r, n), scaling (k,); any floating dtype.
    """
    count = check_factors(B, A, scaling, rank, normalization)
    B, A, s = B.double(), A.double(), scaling.double().abs()
    left, right = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    values = s.unsqueeze(-1) * torch.linalg.svdvals(left @ right.mT)[:, :count]
    rows, columns = (B @ right.mT).norm(dim=-1), (left @ A).norm(dim=-2)
    frobenius = s * torch.linalg.matrix_norm(left @ right.mT)
    return Spectrum(values, s * rows.mean(-1), s * columns.mean(-1), frobenius)


def spsvd(
    B: Tensor,
    A: Tensor,
    scaling: Tensor,
    *,
    rank: int | None = None,
    normalization: str = "two_sided",
) -> Spectrum:
    """SpSVD: spherically normalised directions and robust magnitudes, computed by deflation.

    V holds the leading right singular vectors of `D_ρ⁺ΔW`, U the leading left singular vectors of
    `ΔW·D_γ⁺`. They are paired in order, with aligned signs. `d_k = argmin_d ‖R_k − d·u_k·v_kᵀ‖₁`
    is a weighted median of `R_k[i,j]/(u_i·v_j)` with weights `|u_i·v_j|`. The spectrum is |d_k|,
    sorted. Slow, because it needs dense passes.

    Shape: B (k, m, r), A (k, r, n), scaling (k,); any floating dtype.
    Source: arXiv 2402.09754 (SpSVD).
    """
    count = check_factors(B, A, scaling, rank, normalization)
    plain = svd(B, A, scaling)
    values = [
        _deflate(b.double(), a.double(), count) * float(s.abs())
        for b, a, s in zip(B, A, scaling, strict=True)
    ]
    stacked = torch.stack(values) if values else plain.singular_values
    return plain._replace(singular_values=stacked)


def _deflate(B: Tensor, A: Tensor, count: int) -> Tensor:
    """The `count` values |d_k| of one module with s = 1, descending."""
    left, right = _directions(B, A, count)
    magnitudes = torch.zeros(count, dtype=torch.float64)
    for k in range(count):
        ratios, weights = _ratios(B, A, left[:, :k], magnitudes[:k], right[:, :k], left, right, k)
        magnitudes[k] = _weighted_median(ratios, weights)
    return magnitudes.abs().sort(descending=True).values


def _directions(B: Tensor, A: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """U (m, count) and V (n, count), with signs such that u_kᵀ·ΔW·v_k ≥ 0."""
    core_b, core_a = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    rows, columns = (B @ core_a.mT).norm(dim=1), (core_b @ A).norm(dim=0)
    by_rows = torch.linalg.qr(_inverse(rows, B.norm(dim=1) * A.norm())[:, None] * B, mode="r").R
    by_columns = torch.linalg.qr((A * _inverse(columns, A.norm(dim=0) * B.norm())).mT, mode="r").R
    # Row-normalised ΔW is (D·B)·A, so its right singular vectors are in the row space of A.
    basis, core = torch.linalg.qr(A.mT)
    right = basis @ torch.linalg.svd(by_rows @ core.mT)[2].mT[:, :count]
    basis, core = torch.linalg.qr(B)
    left = basis @ torch.linalg.svd(core @ by_columns.mT)[0][:, :count]
    signs = ((left.mT @ B) * (A @ right).mT).sum(1).sign()
    return left * torch.where(signs < 0, -1.0, 1.0), right


def _ratios(
    B: Tensor, A: Tensor, U: Tensor, d: Tensor, V: Tensor, left: Tensor, right: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """R_k[i,j]/(u_i·v_j) and |u_i·v_j| for non-zero u_i·v_j, formed in blocks of rows."""
    ratios, weights = [], []
    for start in range(0, B.shape[0], BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        residual = B[block] @ A - (U[block] * d) @ V.mT
        outer = left[block, k : k + 1] * right[:, k]
        present = outer.abs() > 0
        ratios.append((residual[present] / outer[present]).float())
        weights.append(outer[present].abs().float())
    return torch.cat(ratios), torch.cat(weights)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The value at which the cumulative weight reaches one half; 0 if there are no values."""
    if not values.numel():
        return torch.zeros((), dtype=torch.float64)
    order = values.argsort()
    below = weights[order].double().cumsum(0)
    return values[order[torch.searchsorted(below, below[-1:] / 2)[0]]].double()


def _inverse(norms: Tensor, bounds: Tensor) -> Tensor:
    return torch.where(norms > ZERO_ROW * bounds, 1.0 / norms, 0.0)
