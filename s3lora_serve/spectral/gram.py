"""The Gram route: two passes over each factor; all further steps use r×r matrices.

The passes run in float32 or float64; the further steps run in float64. A Gram matrix squares the
condition number of its factor. Therefore each solution has an `error_bound`, a bound on its own
error, and the caller solves a module again in a slower arithmetic if the bound is too large.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import EQUILIBRATION_SWEEPS, ZERO_ROW

UNIT = {torch.float32: 2.0**-21, torch.float64: 2.0**-50}
"""Normwise relative error of one Gram matrix, apart from a common factor, which the index cancels.
Eight times the unit roundoff; valid for sums over LONGEST_SUM rows and ranks from FLOAT32_RANK.
tests/spectral/test_switch.py measures it and tests that no error exceeds its `error_bound`."""

MAX_ERROR_BOUND = 1e-6
"""Largest `error_bound` of an accepted solution: the specified accuracy, |SSI error| ≤ 1e-6.
tests/spectral/test_switch.py tests that no error exceeds its `error_bound`."""

FLOAT32_FLATNESS = 0.008
"""λ_min/λ_max of G_A·G_B below which the float32 error bound is too large to try the second pass.
Measured, r = 16 to 64: a spectrum that falls by one decade has a bound of 1.3e-6 or more."""

SANE_TRACE = (1e-20, 1e30)
"""Traces for which float32 squares do not overflow, and those that underflow are negligible."""


class Side(Protocol):
    """One side of k modules of one rank: their B (m, r), or their Aᵀ (n, r)."""

    dtype: torch.dtype  # working dtype of the products: float32 or float64

    def gram(self) -> Tensor:
        """`Xᵀ·X` of every factor. Shape: (k, r, r) float64."""

    def normalised_gram(self, lower: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`Σ_i x_i·x_iᵀ/ρ_i²`, the mean of `ρ_i = ‖x_iᵀ·lower‖₂`, and the number of rows lost.

        Modules that are not `chosen` may be skipped; their results are then meaningless.

        Shape: lower (k, r, r) of the working dtype, chosen (k,) bool -> (k, r, r), (k,), (k,)
        float64.
        """


class Solution(NamedTuple):
    """Spectra for s = 1, not yet multiplied by the means of the norms."""

    normalised: Tensor  # (k, r) singular values of X, descending; only noise beyond min(m, n)
    row_mean: Tensor  # (k,) mean of ρ_i of B·A
    column_mean: Tensor  # (k,) mean of γ_j of B·A
    frobenius: Tensor  # (k,) ‖B·A‖_F
    factors: Tensor  # (k,) ‖B‖_F·‖A‖_F
    error_bound: Tensor  # (k,) bound on |error of SSI|; inf if no bound is known


class CholeskyFactor(NamedTuple):
    """Cholesky factors of the Gram matrices of one side; they give the norms of the other side."""

    lower: Tensor  # (k, r, r) L with L·Lᵀ = G / tr(G), in the working dtype
    trace: Tensor  # (k,) tr(G)
    relative_error: Tensor  # (k,) bound for the squared norms from `lower`; inf if unusable


def solve(rows: Side, columns: Side, normalization: str) -> Solution:
    """Singular values of X from `P = Σ_i b_i·b_iᵀ/ρ_i²` with `ρ_i² = b_iᵀ·(A·Aᵀ)·b_i`, and Q alike.

    `equilibrated` computes P and Q in turn, each from the other.
    Shape: fields of k rows, float64, on the device of the sides.
    """
    dtype = rows.dtype
    gram_b, gram_a = rows.gram(), columns.gram()
    factor_a, factor_b = _cholesky(gram_a, dtype), _cholesky(gram_b, dtype)
    # The index is at least 1/r, so error_bound ≥ relative_error / r. Where that alone exceeds
    # MAX_ERROR_BOUND, the second pass is skipped.
    relative_error = factor_a.relative_error + factor_b.relative_error
    promising = relative_error <= MAX_ERROR_BOUND * gram_a.shape[-1]
    if dtype == torch.float32:
        promising &= _flatness(factor_a.lower, factor_b.lower) > FLOAT32_FLATNESS
    P, row_mean, row_error = _normalised(rows, factor_a, promising)
    Q, column_mean, column_error = _normalised(columns, factor_b, promising)
    relative_error = torch.where(promising, row_error + column_error, torch.inf)
    if normalization == "row":
        Q = gram_a
    elif normalization == "column":
        P = gram_b
    elif normalization == "equilibrated":
        for side in (columns, *(rows, columns) * (EQUILIBRATION_SWEEPS - 1)):
            factor = _cholesky(P if side is columns else Q, dtype)
            swept, _, sweep_error = _normalised(side, factor, promising)
            P, Q = (P, swept) if side is columns else (swept, Q)
            relative_error = relative_error + sweep_error
    values, error_bound = _spectrum(P, Q, relative_error, UNIT[dtype])
    frobenius = (gram_a * gram_b).sum((-1, -2)).clamp_min(0.0).sqrt()
    factors = (factor_a.trace * factor_b.trace).sqrt()
    return Solution(values, row_mean, column_mean, frobenius, factors, error_bound)


def _normalised(
    side: Side, factor: CholeskyFactor, promising: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(k, r, r) normalised Gram, (k,) mean norm, (k,) relative error of the squared norms."""
    total, mean, lost = side.normalised_gram(factor.lower, promising)
    relative_error = torch.where(lost == 0, factor.relative_error, torch.inf)
    return total / factor.trace[:, None, None], mean * factor.trace.sqrt(), relative_error


def _cholesky(matrix: Tensor, dtype: torch.dtype) -> CholeskyFactor:
    """Factor Gram matrices, scaled to unit trace to stay within the range of float32.

    S is G scaled to a unit diagonal; the rounding errors of G scale in the same way. The relative
    error of ρ² = bᵀ·G·b is at most unit·‖S‖/λ_min(S) from G, plus unit·√(r/λ_min(S)) from the
    rounding of bᵀ·L.
    """
    trace = _diagonal(matrix).sum(-1)
    size = (_diagonal(matrix) / trace.unsqueeze(-1)).nan_to_num().clamp_min(1e-300).sqrt()
    scaled = (matrix / trace[:, None, None] / size.unsqueeze(-1) / size.unsqueeze(-2)).nan_to_num()
    lower, failed = torch.linalg.cholesky_ex(scaled)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    root_inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    inverse_norm = _spectral_norm(root_inverse.mT @ root_inverse)  # ≥ 1/λ_min(S)
    rank = matrix.shape[-1]
    relative_error = UNIT[dtype] * (
        _spectral_norm(scaled) * inverse_norm + (rank * inverse_norm).sqrt()
    )
    lower = lower * size.unsqueeze(-1)
    # With tr(G) = 1, ρ² ≥ λ_min(G)·‖b‖² and λ_min(G) ≥ λ_min(S)·min size². If this bound exceeds
    # ZERO_ROW², no row counts as zero. Otherwise the QR route solves the module.
    above_zero = size.amin(-1).square() > ZERO_ROW**2 * inverse_norm
    known = above_zero & (failed == 0) & (trace > 0) & trace.isfinite() & relative_error.isfinite()
    if dtype == torch.float32:
        known &= (SANE_TRACE[0] < trace) & (trace < SANE_TRACE[1])
    return CholeskyFactor(lower.to(dtype), trace, torch.where(known, relative_error, torch.inf))


def _flatness(lower_a: Tensor, lower_b: Tensor) -> Tensor:
    """`λ_min/λ_max` of L_A·L_Aᵀ·L_B·L_Bᵀ, within a factor of r^(1/4); 0 if that is singular."""
    product = (lower_a.mT @ lower_b).double()
    inverse, failed = torch.linalg.inv_ex(product)
    spread = _spectral_norm(product @ product.mT) * _spectral_norm(inverse @ inverse.mT)
    return torch.where((failed == 0) & spread.isfinite(), 1.0 / spread, 0.0)


def _spectrum(P: Tensor, Q: Tensor, relative_error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """`sqrt(eig(P·Q))`, descending, and the bound on the error of the index.

    With `P = C·Cᵀ`, eig(P·Q) = eig(Cᵀ·Q·C). The error of an eigenvalue λ is at most
    δ = unit·(‖P‖_F·‖Q‖₂ + ‖P‖₂·‖Q‖_F), in the inner scaling that makes this sum small. The error of
    its root is at most √λ − √(λ − δ), or √δ if λ < δ. The relative error of a singular value is at
    most that of the weights 1/ρ_i (Ostrowski), which is half that of the squared norms. σ_1 and Σσ
    each have this error, so the index has at most the sum of both.
    """
    P, Q = torch.nan_to_num(P), torch.nan_to_num(Q)
    C, failed = torch.linalg.cholesky_ex(P)
    squares = torch.linalg.eigvalsh(torch.nan_to_num(C.mT @ Q @ C)).flip(-1)
    values = squares.clamp_min(0.0).sqrt()
    delta = unit * _uncertainty(P, Q).unsqueeze(-1)
    root_errors = values - (squares - delta).clamp_min(0.0).sqrt()
    root_errors = torch.where(squares > delta, root_errors, delta.sqrt()).sum(-1)
    total = values.sum(-1)
    error_bound = values[:, 0] / total * (root_errors / total + relative_error)
    return values, torch.where((failed == 0) & error_bound.isfinite(), error_bound, torch.inf)


def _uncertainty(P: Tensor, Q: Tensor) -> Tensor:
    """`‖P'‖_F·‖Q'‖₂ + ‖P'‖₂·‖Q'‖_F` for P' = D·P·D, Q' = D⁻¹·Q·D⁻¹, where D equates the diagonals.

    Rounding errors of a Gram matrix scale with D, so an unbalanced inner basis adds no error.
    Shape: (k, r, r) -> (k,).
    """
    scale = (_diagonal(Q) / _diagonal(P)).nan_to_num().clamp(1e-60, 1e60).pow(0.25)
    across = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    P, Q = P * across, Q / across
    norm = torch.linalg.matrix_norm
    sum_of_both: Tensor = norm(P) * _spectral_norm(Q) + _spectral_norm(P) * norm(Q)
    return sum_of_both


def _spectral_norm(matrix: Tensor) -> Tensor:
    """Schatten 8-norm of a symmetric matrix: 1 to r^(1/8) times its spectral norm."""
    size = torch.linalg.matrix_norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    fourth = torch.linalg.matrix_power(matrix / size[:, None, None], 4)
    bound: Tensor = size * torch.linalg.matrix_norm(fourth).pow(0.25)
    return bound


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
