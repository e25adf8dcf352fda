"""The Gram route: two passes over each factor, then everything from r×r matrices.

The passes run in float32 or float64; what follows is float64. Squaring the factors squares their
condition number, so every solution comes with `error_bound`, a bound on its own error, by which the
caller decides whether a slower arithmetic has to look again.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import EQUILIBRATION_SWEEPS, ZERO_ROW

UNIT = {torch.float32: 2.0**-21, torch.float64: 2.0**-50}
"""Relative error of one Gram matrix, normwise, beside a common factor that the index cannot see.
Eight times the unit roundoff, for sums of LONGEST_SUM and ranks from FLOAT32_RANK on.
tests/spectral/test_switch.py measures it and holds `error_bound` above every error seen."""

MAX_ERROR_BOUND = 1e-6
"""Largest `error_bound` at which a solution is taken: the accuracy promised, |SSI error| ≤ 1e-6.
tests/spectral/test_switch.py holds that no error seen exceeds its error_bound."""

FLOAT32_FLATNESS = 0.008
"""λ_min/λ_max of G_A·G_B below which the float32 error bound is too large: no second pass is tried.
Measured, r = 16 to 64: a spectrum that falls by one decade has a bound of 1.3e-6 or more."""

SANE_TRACE = (1e-20, 1e30)
"""Traces for which float32 squares that vanish are too small to matter, and none overflow."""


class Side(Protocol):
    """One side of k modules of one rank: their B (m, r), or their Aᵀ (n, r)."""

    dtype: torch.dtype  # what passes multiply in: float32 or float64

    def gram(self) -> Tensor:
        """`Xᵀ·X` of every factor. Shape: (k, r, r) float64."""

    def normalised_gram(self, half: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`Σ_i x_i·x_iᵀ/ρ_i²`, the mean of `ρ_i = ‖x_iᵀ·half‖₂`, and how many rows were lost.

        Modules that are not `chosen` may be passed over: what comes back for them means nothing.

        Shape: half (k, r, r) of the working dtype, chosen (k,) bool -> (k, r, r), (k,), (k,)
        float64.
        """


class Modules(Protocol):
    """Modules of one rank, wherever their factors lie."""

    @property
    def arithmetics(self) -> tuple[torch.dtype, ...]:
        """Working dtypes worth trying, the fastest first."""

    def sides(self, chosen: Sequence[int], dtype: torch.dtype) -> tuple[Side, Side]:
        """The B and the Aᵀ of some of the modules, for passes in one dtype."""


class Solution(NamedTuple):
    """Spectra for s = 1, before magnitudes."""

    normalised: Tensor  # (k, r) descending singular values of X; beyond min(m, n) only noise
    row_mean: Tensor  # (k,) mean of ρ_i of B·A
    column_mean: Tensor  # (k,) mean of γ_j of B·A
    frobenius: Tensor  # (k,) ‖B·A‖_F
    factors: Tensor  # (k,) ‖B‖_F·‖A‖_F
    error_bound: Tensor  # (k,) bound on |error of SSI|; inf where nothing is known


class Half(NamedTuple):
    """Cholesky factors of Gram matrices, ready to take norms with."""

    lower: Tensor  # (k, r, r) L with L·Lᵀ = G / tr(G), in the working dtype
    trace: Tensor  # (k,) tr(G)
    slack: Tensor  # (k,) relative error of the squared norms it gives; inf if it gives none


def solve(rows: Side, columns: Side, normalization: str) -> Solution:
    """Singular values of X from `P = Σ_i b_i·b_iᵀ/ρ_i²` with `ρ_i² = b_iᵀ·(A·Aᵀ)·b_i`; Q alike.

    `equilibrated` alternates the two on each other's result.
    Shape: fields of k rows, float64, on the device of the sides.
    """
    dtype = rows.dtype
    gram_b, gram_a = rows.gram(), columns.gram()
    half_a, half_b = _half(gram_a, dtype), _half(gram_b, dtype)
    # The index is at least 1/r, so that much slack alone is too much: no second pass for those.
    promising = half_a.slack + half_b.slack <= MAX_ERROR_BOUND * gram_a.shape[-1]
    if dtype == torch.float32:
        promising &= _flatness(half_a.lower, half_b.lower) > FLOAT32_FLATNESS
    P, row_mean, slack = _normalised(rows, half_a, promising)
    Q, column_mean, column_slack = _normalised(columns, half_b, promising)
    slack = torch.where(promising, slack + column_slack, torch.inf)
    if normalization == "row":
        Q = gram_a
    elif normalization == "column":
        P = gram_b
    elif normalization == "equilibrated":
        for side in (columns, *(rows, columns) * (EQUILIBRATION_SWEEPS - 1)):
            half = _half(P if side is columns else Q, dtype)
            swept, _, more = _normalised(side, half, promising)
            P, Q = (P, swept) if side is columns else (swept, Q)
            slack = slack + more
    values, error_bound = _spectrum(P, Q, slack, UNIT[dtype])
    frobenius = (gram_a * gram_b).sum((-1, -2)).clamp_min(0.0).sqrt()
    factors = (half_a.trace * half_b.trace).sqrt()
    return Solution(values, row_mean, column_mean, frobenius, factors, error_bound)


def _normalised(side: Side, half: Half, promising: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, r, r) normalised Gram, (k,) mean norm, (k,) relative slack of the squared norms."""
    total, mean, lost = side.normalised_gram(half.lower, promising)
    slack = torch.where(lost == 0, half.slack, torch.inf)
    return total / half.trace[:, None, None], mean * half.trace.sqrt(), slack


def _half(matrix: Tensor, dtype: torch.dtype) -> Half:
    """Factor Gram matrices, scaled to unit trace so that float32 stays in its range.

    With S = G scaled to a unit diagonal (rounding errors of G scale likewise), ρ² = bᵀ·G·b errs by
    at most unit·‖S‖/λ_min(S) of itself for G, and by unit·√(r/λ_min(S)) for the rounding of bᵀ·L.
    """
    trace = _diagonal(matrix).sum(-1)
    size = (_diagonal(matrix) / trace.unsqueeze(-1)).nan_to_num().clamp_min(1e-300).sqrt()
    scaled = (matrix / trace[:, None, None] / size.unsqueeze(-1) / size.unsqueeze(-2)).nan_to_num()
    lower, failed = torch.linalg.cholesky_ex(scaled)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    root_inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    steepest = _spectral_norm(root_inverse.mT @ root_inverse)
    rank = matrix.shape[-1]
    slack = UNIT[dtype] * (_spectral_norm(scaled) * steepest + (rank * steepest).sqrt())
    lower = lower * size.unsqueeze(-1)
    # ρ² ≥ λ_min(G)·‖b‖² and λ_min(G) ≥ λ_min(S)·min size²: no row can count as zero, or QR decides.
    above_zero = size.amin(-1).square() > ZERO_ROW**2 * steepest
    known = above_zero & (failed == 0) & (trace > 0) & trace.isfinite() & slack.isfinite()
    if dtype == torch.float32:
        known &= (SANE_TRACE[0] < trace) & (trace < SANE_TRACE[1])
    return Half(lower.to(dtype), trace, torch.where(known, slack, torch.inf))


def _flatness(lower_a: Tensor, lower_b: Tensor) -> Tensor:
    """`λ_min/λ_max` of L_A·L_Aᵀ·L_B·L_Bᵀ, within a factor of r^(1/4); 0 where it is singular."""
    product = (lower_a.mT @ lower_b).double()
    inverse, failed = torch.linalg.inv_ex(product)
    spread = _spectral_norm(product @ product.mT) * _spectral_norm(inverse @ inverse.mT)
    return torch.where((failed == 0) & spread.isfinite(), 1.0 / spread, 0.0)


def _spectrum(P: Tensor, Q: Tensor, slack: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """`sqrt(eig(P·Q))`, descending, and the bound on the index's error.

    With `P = C·Cᵀ`, eig(P·Q) = eig(Cᵀ·Q·C). An eigenvalue λ is known to
    δ = unit·(‖P‖_F·‖Q‖₂ + ‖P‖₂·‖Q‖_F) in the inner scaling that makes the product small, hence its
    root to √λ − √(λ − δ), or √δ where λ < δ. Singular values follow the weights 1/ρ_i one to one
    (Ostrowski), so half the slack of the squared norms goes into each of σ_1 and Σσ.
    """
    P, Q = torch.nan_to_num(P), torch.nan_to_num(Q)
    half, failed = torch.linalg.cholesky_ex(P)
    squares = torch.linalg.eigvalsh(torch.nan_to_num(half.mT @ Q @ half)).flip(-1)
    values = squares.clamp_min(0.0).sqrt()
    delta = unit * _uncertainty(P, Q).unsqueeze(-1)
    wobble = values - (squares - delta).clamp_min(0.0).sqrt()
    wobble = torch.where(squares > delta, wobble, delta.sqrt()).sum(-1)
    total = values.sum(-1)
    error_bound = values[:, 0] / total * (wobble / total + slack)
    return values, torch.where((failed == 0) & error_bound.isfinite(), error_bound, torch.inf)


def _uncertainty(P: Tensor, Q: Tensor) -> Tensor:
    """`‖P'‖_F·‖Q'‖₂ + ‖P'‖₂·‖Q'‖_F` for P' = D·P·D, Q' = D⁻¹·Q·D⁻¹ with diagonals made alike.

    Rounding errors of a Gram matrix scale with D, so a lopsided inner basis costs nothing.
    Shape: (k, r, r) -> (k,).
    """
    scale = (_diagonal(Q) / _diagonal(P)).nan_to_num().clamp(1e-60, 1e60).pow(0.25)
    across = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    P, Q = P * across, Q / across
    norm = torch.linalg.matrix_norm
    sum_of_both: Tensor = norm(P) * _spectral_norm(Q) + _spectral_norm(P) * norm(Q)
    return sum_of_both


def _spectral_norm(matrix: Tensor) -> Tensor:
    """Schatten 8-norm of a symmetric matrix: at most r^(1/8) over its spectral norm."""
    size = torch.linalg.matrix_norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    fourth = torch.linalg.matrix_power(matrix / size[:, None, None], 4)
    bound: Tensor = size * torch.linalg.matrix_norm(fourth).pow(0.25)
    return bound


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
