"""The input projection: an update that acts little on some inputs, and as before on others.

With `C_h = E[x·xᵀ]` over harmful and `C_b` over benign inputs of a module, the minimum of
`‖ΔW'·X_h‖² + λ·‖(ΔW' − ΔW)·X_b‖²` is `ΔW' = ΔW·M`, `M = λ·C_b·(C_h + λ·C_b)⁻¹`. With directions V,
`VᵀC_bV = I`, `VᵀC_hV = diag(μ)`, and `u = C_h·v/μ`, the best M that reads no others is
`M = I − Σ μ/(μ+λ)·u·vᵀ`; with all n directions it is M itself. B stays: `A' = A·M`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096
"""Inputs whose directions are converted at a time: a megabyte with k = 64. Sums over them that are
made in float32 are right to 1e-7 of the factors' norms."""

SQUARES = 1e-20, 1e30
"""Sums of squares that float32 holds to seven digits: single squares far below do not count."""

MAX_OVERLAP_ERROR = 2e-2
"""Largest entry of |VᵀU − 1|: pairs are normalised in float64, and rounded to bfloat16 for the
file, or to float32 where that would cost more."""

Update = tuple[Tensor, Tensor, float]
"""B (m, r), A (r, n) and s of `ΔW = s·B·A`; any floating dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """What is known of the inputs of the modules that share one input site."""

    V: Tensor  # (n, k)
    U: Tensor  # (n, k)
    mu: Tensor  # (k,) float64, descending
    F: Tensor  # (n, f), leading part of C_b: C_b ≈ F·Fᵀ + ridge·I
    ridge: float
    beyond: float  # largest eigenvalue of C_h − U·diag(μ)·Uᵀ against C_b
    overlap: Tensor  # (k, k) float64, VᵀU: I up to the rounding of V and U

    @property
    def width(self) -> int:
        """n, the number of inputs."""
        return len(self.V)


class Coordinates(NamedTuple):
    """What λ and the figures need of one module, float64 on the host: nothing larger than r×k."""

    P: Tensor  # (r, k) A·U
    gram_a: Tensor  # (r, r) A·Aᵀ
    gram_b: Tensor  # (r, r) BᵀB
    square: float  # s²
    benign: float  # tr(ΔW·C_b·ΔWᵀ)
    statistics: InputStatistics

    @property
    def acts(self) -> bool:
        """Whether ΔW differs from 0."""
        return self.square * float((self.gram_a * self.gram_b).sum()) > 0


class Projected(NamedTuple):
    """The new factor of one module."""

    A: Tensor  # (r, n), in the dtype of the module's own
    gram: Tensor  # (r, r) float64, A'·A'ᵀ as rounded


def coordinates(
    updates: Sequence[Update], statistics: InputStatistics, device: str = "cpu"
) -> list[Coordinates]:
    """A·U, A·Aᵀ, BᵀB and tr(ΔW·C_b·ΔWᵀ) of the updates of modules that share an input.

    O(n·r·(k + f + r) + m·r²) operations for each, in few large products for all.

    Shape: B (m, r), A (r, n), any floating dtype, finite.

    Raises:
        ValueError: a product is not finite.
    """
    stacked = torch.cat([A for _, A, _ in updates])
    ranks = [len(A) for _, A, _ in updates]
    for dtype in _dtypes(device, stacked, statistics.U, statistics.F):
        P, Q, own = _products(stacked, ranks, statistics, device, dtype)
        if _in_range(own, dtype):
            break
    if not (P.isfinite().all() and all(gram.isfinite().all() for gram in own)):
        raise ValueError(_OVERFLOW)
    found = []
    rows = zip(updates, torch.split(P, ranks), torch.split(Q, ranks), own, strict=True)
    for (B, _, scaling), p, q, gram_a in rows:
        gram_b = _gram(B.mT, device)
        square = scaling**2
        benign = square * float((gram_b * (q @ q.mT + statistics.ridge * gram_a)).sum())
        if not math.isfinite(benign) or not gram_b.isfinite().all():
            raise ValueError(_OVERFLOW)
        found.append(Coordinates(p, gram_a, gram_b, square, benign, statistics))
    return found


_OVERFLOW = "the products of the factors are beyond the range of float64"


def _products(
    stacked: Tensor, ranks: list[int], statistics: InputStatistics, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A·U and A·F of stacked factors, and A·Aᵀ of each, float64 on the host."""
    k, f = statistics.U.shape[1], statistics.F.shape[1]
    P, Q = (
        torch.zeros(len(stacked), columns, dtype=torch.float64, device=device) for columns in (k, f)
    )
    own = [torch.zeros(rank, rank, dtype=torch.float64, device=device) for rank in ranks]
    for part in _blocks(stacked.shape[1], device):
        A = stacked[:, part].to(device, dtype)
        P += A @ statistics.U[part].to(device, dtype)
        Q += A @ statistics.F[part].to(device, dtype)
        for gram, each in zip(own, torch.split(A, ranks), strict=True):
            gram += each @ each.mT
    return P.cpu(), Q.cpu(), [gram.cpu() for gram in own]


def _dtypes(device: str, *tensors: Tensor) -> list[torch.dtype]:
    """In which products are tried: float32 holds those of factors of 16 bits, in half the time."""
    if device == "cpu" and all(tensor.itemsize == 2 for tensor in tensors):
        return [torch.float32, torch.float64]
    return [torch.float64]


def _in_range(grams: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the squares of the rows' entries were within the range of the dtype.

    One factor of an update may be as small as the other is large.
    """
    low, high = SQUARES
    if dtype == torch.float64:
        return True
    squares = torch.cat([gram.diagonal() for gram in grams])
    return bool(squares.min() >= low) and bool(squares.max() <= high)  # NaN is in no range


def _gram(A: Tensor, device: str = "cpu") -> Tensor:
    """A·Aᵀ, float64 on the host."""
    gram = torch.empty(0)
    for dtype in _dtypes(device, A):
        gram = torch.zeros(len(A), len(A), dtype=torch.float64, device=device)
        for part in _blocks(A.shape[1], device):
            each = A[:, part].to(device, dtype)
            gram += each @ each.mT
        if _in_range([gram], dtype):
            break
    return gram.cpu()


def _blocks(width: int, device: str) -> Iterator[slice]:
    """The inputs, as many at a time as are converted together."""
    step = BLOCK if device == "cpu" else width
    for at in range(0, width, max(1, step)):
        yield slice(at, at + step)


def projected(
    factors: Sequence[Tensor], found: Sequence[Coordinates], lam: float, device: str = "cpu"
) -> list[Projected]:
    """`A' = A·M = A − (A·U)·diag(μ/(μ+λ))·Vᵀ` of modules that share an input, and A'·A'ᵀ.

    Shape: each A (r, n), any floating dtype, to which A' is rounded.
    """
    statistics = found[0].statistics
    stacked = torch.cat(list(factors))
    weighted = torch.cat([each.P for each in found]) * (statistics.mu / (statistics.mu + lam))
    narrow = _dtypes(device, stacked, statistics.V)[0]
    fits = _in_range([each.gram_a for each in found], narrow)
    dtype = narrow if fits else torch.float64
    weighted = weighted.to(device, dtype)
    new = torch.empty(stacked.shape, dtype=stacked.dtype)
    for part in _blocks(stacked.shape[1], device):
        A, V = (each.to(device, dtype) for each in (stacked[:, part], statistics.V[part]))
        new[:, part] = torch.addmm(A, weighted, V.mT, alpha=-1)
    parts = torch.split(new, [len(A) for A in factors])
    rounded = [part.to(A.dtype) for part, A in zip(parts, factors, strict=True)]
    return [Projected(A, _gram(A)) for A in rounded]
