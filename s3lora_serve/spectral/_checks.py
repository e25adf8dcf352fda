"""Checks and constants that all scorers share, so that all raise the same errors."""

import torch
from torch import Tensor

NORMALIZATIONS = ("two_sided", "row", "column", "equilibrated")

ZERO_ROW = 1e-12
"""A row counts as zero if `ρ_i ≤ ZERO_ROW · |s| · ‖b_i‖ · ‖A‖_F`; the same holds for columns.

Such a row is the remainder of a cancellation: rounding noise that division by ρ_i would amplify.
"""

EQUILIBRATION_SWEEPS = 3
"""Number of `equilibrated` sweeps. A sweep makes unit rows, then unit columns."""


def check_factors(
    B: Tensor, A: Tensor, scaling: Tensor, rank: int | None, normalization: str
) -> int:
    """Check a batch of factors and return M, the number of singular values to keep.

    Shape: B (k, m, r), A (k, r, n), scaling (k,). Floating dtypes.

    Raises:
        ValueError: a shape, dtype or option is invalid; the message names it.
    """
    if B.ndim != 3 or A.ndim != 3 or B.shape[0] != A.shape[0] or B.shape[2] != A.shape[1]:
        raise ValueError(
            f"expected B (k, m, r) and A (k, r, n), got {tuple(B.shape)} and {tuple(A.shape)}"
        )
    if not (B.dtype.is_floating_point and A.dtype.is_floating_point):
        raise ValueError(f"expected floating-point factors, got {B.dtype} and {A.dtype}")
    if scaling.shape != (B.shape[0],):
        raise ValueError(f"expected scaling of shape ({B.shape[0]},), got {tuple(scaling.shape)}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"expected a normalization of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"expected rank >= 1 or None, got {rank}")
    full = min(B.shape[1], B.shape[2], A.shape[2])
    return full if rank is None else min(rank, full)


def in_range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 matrix divided by a power of two near its largest entry, and that power.

    The division keeps products, squares and inverses of the entries within the range of float64.
    Entries more than 10¹⁴⁰ times smaller than the largest become zero; of the dtypes of a factor,
    only float64 can hold both.
    """
    one = torch.ones((), dtype=matrix.dtype)
    if not matrix.numel():
        return matrix, one
    exponent = torch.frexp(matrix.abs().max()).exponent.clamp(-1020, 1020)
    size = torch.ldexp(one, exponent)
    scaled = matrix / size
    return torch.where(scaled.abs() < 1e-140, 0.0, scaled), size
