"""What an input projection needs of two covariances: their leading generalized eigenpairs."""

from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.input_projection import InputStatistics
from s3lora_serve.spectral.leading_subspace import leading_subspace

LEADING = 16
"""Directions of C_b in F: they hold most of its energy, and only totals are made of them. Ours."""

EXACT = 2048
"""Width up to which all eigenvectors are computed. Wider: those that are kept, by a randomised
method, in a tenth of the time at n = 8192. Ours."""


class Pairs(NamedTuple):
    """Statistics of one input site, and what share of the covariances they hold."""

    statistics: InputStatistics
    harmful_captured: float  # of tr(C_h)
    benign_captured: float  # of tr(C_b), by F alone


def generalized_pairs(
    C_h: Tensor, C_b: Tensor, *, rank: int, epsilon: float, dtype: torch.dtype
) -> Pairs:
    """The `rank` pairs of `C_h·v = μ·C_b·v` with the largest μ, `C_b ← C_b + ε·tr(C_b)/n·I`.

    With `C_b = L·Lᵀ` and the eigenvectors q of `L⁻¹·C_h·L⁻ᵀ`: `v = L⁻ᵀ·q`, `u = C_b·v = L·q`.

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
    L = torch.linalg.cholesky(C_b)
    half = torch.linalg.solve_triangular(L, C_h, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    Q, mu, following = _leading(whitened, rank)
    V = torch.linalg.solve_triangular(L.mT, Q, upper=True).to(dtype)
    U = (L @ Q).to(dtype)
    directions, values, _ = _leading(C_b, min(rank, LEADING))
    rest = (float(C_b.trace()) - float(values.sum())) / max(1, n - len(values))
    F = (directions * (values - rest).clamp_min(0.0).sqrt()).to(dtype)
    statistics = InputStatistics(
        V=V.cpu(),
        U=U.cpu(),
        mu=mu.cpu(),
        F=F.cpu(),
        ridge=rest,
        beyond=following,
        overlap=(V.double().mT @ U.double()).cpu(),
    )
    captured = float((U.double().square().sum(0) * mu).sum()) / float(C_h.trace())
    return Pairs(statistics, captured, float(values.sum()) / float(C_b.trace()))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The leading eigenvectors and eigenvalues of a symmetric matrix, and the next eigenvalue.

    Shape: (n, n) -> (n, k), (k,) descending, k = min(rank, n).
    """
    n = len(matrix)
    rank = min(rank, n)
    if n <= EXACT:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    else:
        vectors, values = leading_subspace(matrix, rank + 1)
    following = float(values[rank]) if len(values) > rank else 0.0
    return vectors[:, :rank].contiguous(), values[:rank].contiguous(), following
