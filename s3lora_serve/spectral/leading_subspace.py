"""The leading directions of a large matrix, by randomised SVD or exactly, and how far they are from
orthonormal."""

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Directions drawn beyond the wanted ones. Source: Halko, Martinsson and Tropp (2011), 5 to 20."""

POWER_ITERATIONS = 3
"""Multiplications by V·Vᵀ that sharpen the drawn directions. Measured: tests/spectral."""

EXACT = 1024
"""Width up to which all eigenvectors of a symmetric matrix are computed. Wider: those that are
kept, by the randomised method, in a tenth of the time at n = 8192. Ours."""


def skew(gram: Tensor) -> float:
    """Largest entry of |UᵀU − 1|, or of |VᵀU − 1|, from that product."""
    if not len(gram):
        return 0.0
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def leading_subspace(V: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """U_k and σ_1…σ_k of V; `Σσ² = ‖U_kᵀV‖_F²` holds for the U_k that is returned.

    Without `exact`, U_k is a seeded randomised SVD's: the captured energy is exact, and at most
    that of the best subspace.

    Shape: V (m, n) float32 -> (m, k), (k,) float32, k = min(rank, m, n).
    Source: Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
    """
    rank = min(rank, *V.shape)
    width = min(rank + OVERSAMPLING, *V.shape)
    if exact or 2 * width >= min(V.shape):
        left, values, _ = torch.linalg.svd(V, full_matrices=False)
        return left[:, :rank].contiguous(), values[:rank]
    draw = torch.Generator(device="cpu").manual_seed(0)
    sample = torch.randn(V.shape[1], width, generator=draw, dtype=V.dtype).to(V.device)
    basis = torch.linalg.qr(V @ sample).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(V @ torch.linalg.qr(V.mT @ basis).Q).Q
    left, values, _ = torch.linalg.svd(basis.mT @ V, full_matrices=False)
    return (basis @ left)[:, :rank].contiguous(), values[:rank]


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors and eigenvalues of a symmetric, positive semidefinite matrix.

    Shape: (n, n) -> (n, k), (k,) descending, k = min(rank, n).
    """
    n = len(matrix)
    rank = min(rank, n)
    if n <= EXACT:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    else:
        vectors, values = leading_subspace(matrix, rank)
    return vectors[:, :rank].contiguous(), values[:rank].contiguous()
