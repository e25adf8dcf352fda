"""The two passes over a LoRA factor, in torch. `triton_ops` has the same names and signatures."""

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-36, torch.float64: 1e-290}
"""Smallest ρ² that the dtype holds to full precision; rows below it are zero, or lost."""


def gram(X: Tensor, dtype: torch.dtype) -> Tensor:
    """`Xᵀ·X` of each matrix in a batch.

    Shape: X (k, d, r), any strides and floating dtype -> (k, r, r) float64. Products and sums over
    d are taken in `dtype`, float32 or float64: callers bound d and add up the results.
    """
    X = X.to(dtype)
    return torch.bmm(X.mT, X).double()


def normalised_gram(
    X: Tensor, half: Tensor, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Σ_i x_i·x_iᵀ / ρ_i²`, `Σ_i ρ_i` with `ρ_i = ‖x_iᵀ·half‖₂`, and the rows lost, in one pass.

    A row is lost when it is not zero and its ρ² is below FLOOR: what its weight would be is noise.
    `scratch` is overwritten in the place of fresh memory, whose first touch costs more than the
    arithmetic does.

    Shape: X (k, d, r), any strides and floating dtype, half (k, r, r) float32 or float64, the dtype
    to work in, scratch as many of those as X has -> (k, r, r), (k,), (k,) float64.
    """
    X = X.to(half.dtype)
    k, d, r = X.shape
    scratch = torch.empty(X.numel(), dtype=X.dtype, device=X.device) if scratch is None else scratch
    # (k, r, d): the sum over r then runs along whole cache lines.
    images = torch.bmm(half.mT, X.mT, out=scratch.view(k, r, d))
    squares = images.square_().sum(1)
    small = squares < FLOOR[X.dtype]
    lost = torch.zeros(k, dtype=torch.float64, device=X.device)
    if small.any():
        lost += (small & (X != 0).any(-1)).sum(-1)
    weights = squares.clamp_min(FLOOR[X.dtype]).rsqrt_().unsqueeze(-1)
    out = scratch.view(k, r, d).mT if X.stride(1) == 1 else scratch.view(k, d, r)
    weighted = torch.mul(X, weights, out=out)
    sums = squares.sqrt_().sum(-1, dtype=torch.float64)
    return torch.bmm(weighted.mT, weighted).double(), sums, lost
