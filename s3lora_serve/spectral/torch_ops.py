"""The two passes over a LoRA factor, in torch. `triton_passes` has their twins."""

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-36, torch.float64: 1e-290}
"""Smallest ρ² that the dtype holds to full precision. A row below it is zero or lost."""


def gram(X: Tensor, dtype: torch.dtype) -> Tensor:
    """`Xᵀ·X` of each matrix in a batch.

    Shape: X (k, d, r), any strides and floating dtype -> (k, r, r) float64. Products and sums over
    d use `dtype`, float32 or float64; therefore callers limit d and add the results.
    """
    X = X.to(dtype)
    return torch.bmm(X.mT, X).double()


def normalised_gram(
    X: Tensor, lower: Tensor, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Σ_i x_i·x_iᵀ / ρ_i²`, `Σ_i ρ_i` with `ρ_i = ‖x_iᵀ·lower‖₂`, and the number of rows lost.

    A row is lost if it is not zero and its ρ² is below FLOOR: its weight would be noise. All three
    results come from one pass. `scratch` is overwritten instead of fresh memory, because the first
    touch of fresh memory costs more than the arithmetic.

    Shape: X (k, d, r), any strides and floating dtype, lower (k, r, r) in the working dtype, which
    is float32 or float64, scratch of X.numel() elements in the working dtype -> (k, r, r), (k,),
    (k,) float64.
    """
    X = X.to(lower.dtype)
    k, d, r = X.shape
    scratch = torch.empty(X.numel(), dtype=X.dtype, device=X.device) if scratch is None else scratch
    # With layout (k, r, d) the sum over r reads whole cache lines.
    images = torch.bmm(lower.mT, X.mT, out=scratch.view(k, r, d))
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
