"""An adapter's factors in the coordinates of a base model's statistics, and new factors from them.

All that repair decides is decided in these coordinates (`two_sided.py`). The large products are
here: `A·U`, `A·F`, `QᵀB` and the Gram matrices once, then `A' = X_a·A + Y_a·Vᵀ` and
`B' = B·X_b + Q·Y_b`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.two_sided import FactorPair

BLOCK = 4096
"""Inputs whose directions are converted at a time: a megabyte with k = 64. Sums over them that are
made in float32 are right to 1e-7 of the factors' norms."""

SQUARES = 1e-20, 1e30
"""Sums of squares that float32 holds to seven digits: single squares far below do not count."""

MAX_OVERLAP_ERROR = 2e-2
"""Largest entry of |VᵀU − 1| and of |QᵀQ − 1|: directions are normalised in float64, and rounded to
bfloat16 for the file, or to float32 where that would cost more."""

Update = tuple[Tensor, Tensor, float]
"""B (m, r), A (r, n) and s of `ΔW = s·B·A`; any floating dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """What is known of the inputs of the modules that share one input site.

    `C_b ≈ U·Uᵀ + R`, `R = F·Fᵀ + ridge·I`, and `C_h ≈ U·diag(μ)·Uᵀ + mu_rest·R`.
    """

    V: Tensor  # (n, k), VᵀU = I
    U: Tensor  # (n, k)
    mu: Tensor  # (k,) float64, descending
    F: Tensor  # (n, f)
    ridge: float
    mu_rest: float
    beyond: float  # largest eigenvalue of C_h − U·diag(μ)·Uᵀ against C_b
    inverse: Tensor  # (k, k) float64, (VᵀU)⁻¹: I up to the rounding of V and U

    @property
    def width(self) -> int:
        """n, the number of inputs."""
        return len(self.V)


@dataclass(frozen=True, slots=True, eq=False)
class OutputStatistics:
    """What is known of one module's outputs: `G ≈ Q·diag(γ)·Qᵀ + gamma_rest·(I − Q·Qᵀ)`."""

    Q: Tensor  # (m, q), QᵀQ = I
    gamma: Tensor  # (q,) float64, descending
    gamma_rest: float
    inverse: Tensor  # (q, q) float64, (QᵀQ)⁻¹: I up to the rounding of Q

    @property
    def width(self) -> int:
        """m, the number of outputs."""
        return len(self.Q)


class Coordinates(NamedTuple):
    """What repair needs of one module, float64 on the host: nothing larger than r×k."""

    P: Tensor  # (r, k) A·U
    rest_a: Tensor  # (r, r) A·(F·Fᵀ + ridge·I)·Aᵀ
    gram_a: Tensor  # (r, r) A·Aᵀ
    S: Tensor  # (q, r) QᵀB
    rest_b: Tensor  # (r, r) BᵀB without what lies in Q
    gram_b: Tensor  # (r, r) BᵀB
    square: float  # s²
    inputs: InputStatistics
    outputs: OutputStatistics

    @property
    def acts(self) -> bool:
        """Whether ΔW differs from 0."""
        return self.square * float((self.gram_a * self.gram_b).sum()) > 0


class NewFactors(NamedTuple):
    """The new factors of one module, in the dtypes of its own, and their Gram matrices."""

    B: Tensor  # (m, r)
    A: Tensor  # (r, n)
    gram_b: Tensor  # (r, r) float64, B'ᵀB' as rounded
    gram_a: Tensor  # (r, r) float64, A'·A'ᵀ as rounded


_OVERFLOW = "the products of the factors are beyond the range of float64"


def coordinates(
    updates: Sequence[Update],
    inputs: InputStatistics,
    outputs: Sequence[OutputStatistics],
) -> list[Coordinates]:
    """The coordinates of the updates of modules that share an input.

    O(n·r·(k + f + r) + m·r·(q + r)) operations for each, those of inputs in few large products.

    Shape: B (m, r), A (r, n), any floating dtype, finite.

    Raises:
        ValueError: a product is not finite.
    """
    stacked = torch.cat([A for _, A, _ in updates])
    ranks = [len(A) for _, A, _ in updates]
    for dtype in _dtypes(stacked, inputs.U, inputs.F):
        P, R, grams = _of_inputs(stacked, ranks, inputs, dtype)
        if _in_range(grams, dtype):
            break
    found = []
    rows = zip(updates, torch.split(P, ranks), torch.split(R, ranks), grams, outputs, strict=True)
    for (B, _, scaling), p, r, gram_a, own in rows:
        S, gram_b = _of_outputs(B, own)
        inside = S.mT @ own.inverse @ S
        each = Coordinates(
            P=p,
            rest_a=r @ r.mT + inputs.ridge * gram_a,
            gram_a=gram_a,
            S=S,
            rest_b=gram_b - inside,
            gram_b=gram_b,
            square=scaling**2,
            inputs=inputs,
            outputs=own,
        )
        products = (each.P, each.rest_a, each.gram_a, each.S, each.gram_b)
        if not math.isfinite(each.square) or not all(e.isfinite().all() for e in products):
            raise ValueError(_OVERFLOW)
        found.append(each)
    return found


def _of_inputs(
    stacked: Tensor, ranks: list[int], inputs: InputStatistics, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A·U and A·F of stacked factors, and A·Aᵀ of each, float64."""
    k, f = inputs.U.shape[1], inputs.F.shape[1]
    P, R = (torch.zeros(len(stacked), columns, dtype=torch.float64) for columns in (k, f))
    own = [torch.zeros(rank, rank, dtype=torch.float64) for rank in ranks]
    for part in _blocks(stacked.shape[1]):
        A = stacked[:, part].to(dtype)
        P += A @ inputs.U[part].to(dtype)
        R += A @ inputs.F[part].to(dtype)
        for gram, each in zip(own, torch.split(A, ranks), strict=True):
            gram += each @ each.mT
    return P, R, own


def _of_outputs(B: Tensor, outputs: OutputStatistics) -> tuple[Tensor, Tensor]:
    """QᵀB and BᵀB, float64."""
    q, r = outputs.Q.shape[1], B.shape[1]
    found = torch.empty(0)
    for dtype in _dtypes(B, outputs.Q):
        found = torch.zeros(q + r, r, dtype=torch.float64)
        for part in _blocks(len(B)):
            own = B[part].to(dtype)
            found[:q] += outputs.Q[part].to(dtype).mT @ own
            found[q:] += own.mT @ own
        if _in_range([found[q:]], dtype):
            break
    return found[:q], found[q:]


def _dtypes(*tensors: Tensor) -> list[torch.dtype]:
    """In which products are tried: float32 holds those of factors of 16 bits, in half the time."""
    if all(tensor.itemsize == 2 for tensor in tensors):
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


def _blocks(width: int) -> Iterator[slice]:
    """The inputs or outputs, as many at a time as are converted together."""
    for at in range(0, width, BLOCK):
        yield slice(at, at + BLOCK)


def new_factors(
    factors: Sequence[tuple[Tensor, Tensor]],
    found: Sequence[Coordinates],
    repaired: Sequence[FactorPair],
) -> list[NewFactors]:
    """`A' = X_a·A + Y_a·Vᵀ` and `B' = B·X_b + Q·Y_b` of modules that share an input.

    Y_a and Y_b make `A'·U` and `QᵀB'` what `repaired` has.

    Shape: each B (m, r) and A (r, n), any floating dtype, to which the new ones are rounded.
    """
    made = []
    for (B, A), each, new in zip(factors, found, repaired, strict=True):
        Y_a = (new.P - new.X_a @ each.P) @ each.inputs.inverse
        Y_b = each.outputs.inverse @ (new.S - each.S @ new.X_b)
        # Bᵀ' = X_bᵀ·Bᵀ + Y_bᵀ·Qᵀ has the same form.
        new_a = _sum(A, new.X_a, each.inputs.V, Y_a, each.gram_a)
        new_b = _sum(B.mT, new.X_b.mT, each.outputs.Q, Y_b.mT, each.gram_b)
        made.append(NewFactors(new_b.mT.contiguous(), new_a, _gram(new_b), _gram(new_a)))
    return made


def _sum(A: Tensor, X: Tensor, V: Tensor, Y: Tensor, gram: Tensor) -> Tensor:
    """`X·A + Y·Vᵀ` rounded to the dtype of A, (r, n)."""
    narrow = _dtypes(A, V)[0]
    dtype = narrow if _in_range([gram], narrow) else torch.float64
    X, Y = X.to(dtype), Y.to(dtype)
    new = torch.empty(A.shape, dtype=A.dtype)
    for part in _blocks(A.shape[1]):
        own, directions = (each.to(dtype) for each in (A[:, part], V[part]))
        new[:, part] = torch.addmm(X @ own, Y, directions.mT)
    return new


def _gram(A: Tensor) -> Tensor:
    """A·Aᵀ, float64."""
    gram = torch.empty(0)
    for dtype in _dtypes(A):
        gram = torch.zeros(len(A), len(A), dtype=torch.float64)
        for part in _blocks(A.shape[1]):
            each = A[:, part].to(dtype)
            gram += each @ each.mT
        if _in_range([gram], dtype):
            break
    return gram
