"""Checks shared by every scorer, so that twins refuse the same input with the same words."""

import torch
from torch import Tensor

NORMALIZATIONS = ("two_sided", "row", "column", "equilibrated")

ZERO_ROW = 1e-12
"""A row counts as zero at `ρ_i ≤ ZERO_ROW · |s| · ‖b_i‖ · ‖A‖_F` (columns alike).

Below it a row is what is left of a cancellation: rounding noise that dividing by ρ_i would blow up.
"""

EQUILIBRATION_SWEEPS = 3
"""Alternating sweeps of `equilibrated`: unit rows, then unit columns."""


def check_factors(
    B: Tensor, A: Tensor, scaling: Tensor, rank: int | None, normalization: str
) -> int:
    """Check a batch of factors and return M, the number of singular values to keep.

    Shape: B (k, m, r), A (k, r, n), scaling (k,). Floating dtypes.

    Raises:
        ValueError: a shape, dtype or option does not fit; the message says which.
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
    """A float64 matrix over a power of two near its largest entry, and that power.

    float64 can hold what products, squares and inverses cannot. What is 10¹⁴⁰ times smaller than
    the largest entry is dropped: in no other dtype can one factor hold both.
    """
    one = torch.ones((), dtype=matrix.dtype)
    if not matrix.numel():
        return matrix, one
    exponent = torch.frexp(matrix.abs().max()).exponent.clamp(-1020, 1020)
    size = torch.ldexp(one, exponent)
    scaled = matrix / size
    return torch.where(scaled.abs() < 1e-140, 0.0, scaled), size
