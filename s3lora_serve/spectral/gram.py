"""The Gram route: everything from r×r Gram matrices, in float64, with a bound on its own error.

Two passes over B and A, O((m+n)·r²) per module. Squaring the factors squares their condition
number, so nearly singular modules come back with a large `doubt` and belong to the QR route.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import EQUILIBRATION_SWEEPS, ZERO_ROW

_EPS = torch.finfo(torch.float64).eps


class Solution(NamedTuple):
    """A batch of unscaled (s = 1) low-rank solutions."""

    normalised: Tensor  # (k, r) descending singular values of X, zero-padded beyond the rank of X
    rows: Tensor  # (k, m) ρ_i of B·A, zero where cancelled
    columns: Tensor  # (k, n) γ_j of B·A
    frobenius: Tensor  # (k,) ‖B·A‖_F
    doubt: Tensor  # (k,) bound on |error of SSI|


def solve(B: Tensor, A: Tensor, normalization: str) -> Solution:
    """Singular values of `X = D_ρ⁺·B·A·D_γ⁺` as `sqrt(eig(P·Q))`, `P = B̂ᵀB̂`, `Q = ÂÂᵀ`.

    Shape: B (k, m, r), A (k, r, n), float64 and finite.
    Source: spec of the exact low-rank form; eig(P·Q) taken as eig(P^{1/2} Q P^{1/2}).
    """
    gram_a, gram_b = A @ A.mT, B.mT @ B
    rows, rows_doubt = _norms(B, gram_a)
    columns, columns_doubt = _norms(A.mT, gram_b)
    frobenius = rows.square().sum(-1).sqrt()

    row_weights, column_weights = _weights(B, A, gram_a, rows, columns, normalization)
    weighted_b = B * row_weights.unsqueeze(-1)
    weighted_a = A * column_weights.unsqueeze(-2)
    values, spectral_doubt = _spectrum(weighted_b.mT @ weighted_b, weighted_a @ weighted_a.mT)
    doubt = torch.stack((rows_doubt, columns_doubt, spectral_doubt)).amax(0)
    return Solution(values, rows, columns, frobenius, doubt)


def _norms(vectors: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """`sqrt(vᵀ·G·v)` for each vector, and the relative error the worst of them may carry.

    Shape: vectors (k, m, r), gram (k, r, r) -> (k, m), (k,).
    """
    squares = ((vectors @ gram) * vectors).sum(-1).clamp_min(0.0)
    bounds = vectors.square().sum(-1) * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    # b_i = 0 is an honest zero row; anything else that small here is for the QR route to judge.
    kept = torch.where(squares > ZERO_ROW**2 * bounds, squares, 0.0)
    ratio = torch.where(bounds > 0, bounds / squares, 0.0)
    worst = ratio.amax(-1) if ratio.shape[-1] else ratio.sum(-1)
    return kept.sqrt(), gram.shape[-1] * _EPS * worst


def _weights(
    B: Tensor, A: Tensor, gram_a: Tensor, rows: Tensor, columns: Tensor, normalization: str
) -> tuple[Tensor, Tensor]:
    """Diagonals of the row and column scalings that turn ΔW into X. Shape: (k, m), (k, n)."""
    inverse_rows, inverse_columns = inverse(rows), inverse(columns)
    if normalization == "row":
        return inverse_rows, torch.ones_like(columns)
    if normalization == "column":
        return torch.ones_like(rows), inverse_columns
    if normalization == "two_sided":
        return inverse_rows, inverse_columns
    weighted_gram = gram_a
    for _ in range(EQUILIBRATION_SWEEPS):
        row_weights = inverse(_norms(B, weighted_gram)[0]) * (rows > 0)
        weighted_b = B * row_weights.unsqueeze(-1)
        column_weights = inverse(_norms(A.mT, weighted_b.mT @ weighted_b)[0]) * (columns > 0)
        weighted_a = A * column_weights.unsqueeze(-2)
        weighted_gram = weighted_a @ weighted_a.mT
    return row_weights, column_weights


def _spectrum(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """`sqrt(eig(P·Q))`, descending, and a bound on the relative error of their sum.

    An eigenvalue is known to δ = r·eps·‖P‖·‖Q‖, hence its root to min(√δ, δ/σ).
    Shape: P, Q (k, r, r) -> (k, r), (k,).
    """
    eigenvalues, vectors = torch.linalg.eigh(P)
    half = vectors * eigenvalues.clamp_min(0.0).sqrt().unsqueeze(-2)
    squares = torch.linalg.eigvalsh(half.mT @ Q @ half).flip(-1).clamp_min(0.0)
    values = squares.sqrt()
    delta = P.shape[-1] * _EPS * torch.linalg.matrix_norm(P) * torch.linalg.matrix_norm(Q)
    slack = delta.unsqueeze(-1) / torch.maximum(values, delta.sqrt().unsqueeze(-1))
    total = values.sum(-1)
    return values, torch.where(total > 0, slack.nan_to_num().sum(-1) / total, 0.0)


def inverse(norms: Tensor) -> Tensor:
    """Moore-Penrose inverse of a diagonal of norms: zero stays zero."""
    return torch.where(norms > 0, 1.0 / norms, 0.0)
