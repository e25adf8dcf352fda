"""What repair needs of the covariances of a module's inputs: the directions that it acts on.

Of all `M = I − R` with R of rank k, one is the best for an update of which nothing is known: it
makes `tr(M·C_h·Mᵀ) + λ·tr(R·C_b·Rᵀ)` least (reduced-rank regression: Izenman, 1975). The
generalized eigenvectors of `C_h·v = μ·C_b·v` with the largest μ are far from it: they are the most
harmful directions for their size, and many of them are small.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.base_statistics import MAX_OVERLAP_ERROR, InputStatistics
from s3lora_serve.spectral.leading_subspace import leading, skew

LEADING = 16
"""Directions in F of what U leaves of C_b: they hold most of its energy. Ours."""

BALANCE = 0.3
"""The λ for which the directions are the best. For λ from 0.03 to 1 the gain with them is within
0.01 of the best of the same rank; measured on the sites of a 135M model with k = 64."""

SMALLEST = 1e-9
"""Directions whose μ is under this share of the largest are left out: they are rounding."""


class InputDirections(NamedTuple):
    """Statistics of one input site, and what share of the covariances they hold."""

    statistics: InputStatistics
    harmful_captured: float  # of tr(C_h)
    benign_captured: float  # of tr(C_b), by U and F


def input_directions(
    C_h: Tensor, C_b: Tensor, *, rank: int, epsilon: float, dtype: torch.dtype
) -> InputDirections:
    """The pairs v, u of the best projections of a rank, `C_b ← C_b + ε·tr(C_b)/n·I`.

    The directions V span the leading generalized eigenvectors of `C_h²·w = θ·(C_h + λ·C_b)·w` with
    λ = BALANCE. In that span `VᵀC_bV = I` and `VᵀC_hV = diag(μ)`, and `u = C_h·v/μ`. Then
    `VᵀU = I`, and `R = Σ μ/(μ+λ)·u·vᵀ` is the best R on that span for every λ. Pairs that rounding
    to 16 bits would move by more than MAX_OVERLAP_ERROR are kept in float32.

    Shape: C_h and C_b (n, n) float64, symmetric -> V and U (n, k), F (n, f) in `dtype`.

    Raises:
        ValueError: a covariance is zero or not finite.
    """
    n = len(C_b)
    for name, each in (("harmful", C_h), ("benign", C_b)):
        if not each.isfinite().all() or not float(each.trace()) > 0:
            raise ValueError(f"the inputs of the {name} probes are all zero or not finite")
    ridge = epsilon * float(C_b.trace()) / n
    C_b = C_b + ridge * torch.eye(n, dtype=C_b.dtype, device=C_b.device)
    V, mu = _directions(C_h, C_b, rank)
    U = C_h @ V / mu
    beyond = _beyond(C_h - (U * mu) @ U.mT, C_b)
    captured = min(1.0, float((U.square().sum(0) * mu).sum()) / float(C_h.trace()))
    if skew(V.to(dtype).double().mT @ U.to(dtype).double()) > MAX_OVERLAP_ERROR:
        dtype = torch.promote_types(dtype, torch.float32)
    V, U = V.to(dtype), U.to(dtype)
    left = C_b - U.double() @ U.double().mT
    directions, values = leading(left, min(rank, LEADING))
    rest = max(0.0, float(left.trace()) - float(values.sum())) / max(1, n - len(values))
    F = (directions * (values - rest).clamp_min(0.0).sqrt()).to(dtype)
    nothing = float(left.trace()) <= SMALLEST * float(C_b.trace())
    mu_rest = 0.0 if nothing else (1 - captured) * float(C_h.trace()) / float(left.trace())
    held = float(U.double().square().sum()) + float(values.sum())
    statistics = InputStatistics(
        V=V.cpu(),
        U=U.cpu(),
        mu=mu.cpu(),
        F=F.cpu(),
        ridge=rest,
        mu_rest=mu_rest,
        beyond=beyond,
        inverse=torch.linalg.inv(V.double().mT @ U.double()).cpu(),
    )
    return InputDirections(statistics, captured, min(1.0, held / float(C_b.trace())))


def _directions(C_h: Tensor, C_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V (n, k) with `VᵀC_bV = I`, and the μ of `VᵀC_hV = diag(μ)`, descending."""
    L = torch.linalg.cholesky(C_h + BALANCE * C_b)
    whitened = torch.linalg.solve_triangular(L, C_h, upper=False)
    Q, _ = leading(whitened @ whitened.mT, rank)
    W = torch.linalg.solve_triangular(L.mT, Q, upper=True)
    inner = torch.linalg.cholesky(W.mT @ C_b @ W)
    small = _whitened(W.mT @ C_h @ W, inner)
    mu, Z = torch.linalg.eigh((small + small.mT) / 2)
    mu, Z = mu.flip(0), Z.flip(1)
    kept = mu > SMALLEST * mu[0]
    V = W @ torch.linalg.solve_triangular(inner.mT, Z[:, kept], upper=True)
    return V, mu[kept].contiguous()


def _beyond(rest: Tensor, C_b: Tensor) -> float:
    """The largest eigenvalue of what the pairs leave of C_h, against C_b."""
    _, values = leading(_whitened(rest, torch.linalg.cholesky(C_b)), 1)
    return max(0.0, float(values[0]))


def _whitened(C: Tensor, L: Tensor) -> Tensor:
    """`L⁻¹·C·L⁻ᵀ` of a symmetric C."""
    half = torch.linalg.solve_triangular(L, C, upper=False)
    whitened: Tensor = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return whitened
