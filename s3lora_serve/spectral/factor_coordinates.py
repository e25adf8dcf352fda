"""An adapter's factors in the coordinates of a base model's statistics, and new factors from them.

All that repair decides is decided in these coordinates (`two_sided.py`). The large products are
here: `A·U`, `A·F`, `QᵀB` and the Gram matrices once, then `A' = X_a·A + Y_a·Vᵀ` and
`B' = B·X_b + Q·Y_b`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from s3lora_serve.spectral.base_statistics import InputStatistics, OutputStatistics
from s3lora_serve.spectral.two_sided import FactorPair

BLOCK = 16384
"""Inputs whose directions are converted at a time: four megabytes with k = 64. Sums over them that
are made in float32 are right to 1e-7 of the factors' norms."""

SQUARES = 1e-20, 1e30
"""Sums of squares that float32 holds to seven digits: single squares far below do not count."""

Update = tuple[Tensor, Tensor, float]
"""B (m, r), A (r, n) and s of `ΔW = s·B·A`; any floating dtype."""


class Coordinates(NamedTuple):
    """What repair needs of one module, float64 on the host: nothing larger than r×k."""

    P: Tensor  # (r, k) A·U
    rest_a: Tensor  # (r, r) A·(F·Fᵀ + ridge·I)·Aᵀ
    gram_a: Tensor  # (r, r) A·Aᵀ
    S: Tensor  # (q, r) QᵀB
    rest_b: Tensor  # (r, r) BᵀB without what lies in Q
    gram_b: Tensor  # (r, r) BᵀB
    square: float  # s²
    shift: float | None  # s·tr((B·A)ᵀ·C): log-odds of a refusal that ΔW adds, to first order
    products: torch.dtype  # in which the narrowest of these products were made
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
    P, R, grams, of_inputs = _of_inputs([A for _, A, _ in updates], inputs)
    found = []
    rows = zip(updates, P, R, grams, outputs, strict=True)
    for (B, _, scaling), p, r, gram_a, own in rows:
        S, gram_b, of_outputs = _of_outputs(B, own)
        inside = S.mT @ own.inverse @ S
        each = Coordinates(
            P=p,
            rest_a=r @ r.mT + inputs.ridge * gram_a,
            gram_a=gram_a,
            S=S,
            rest_b=gram_b - inside,
            gram_b=gram_b,
            square=scaling**2,
            shift=None if own.shift is None else scaling * float(((S.mT @ own.shift) * p).sum()),
            products=min(of_inputs, of_outputs, key=lambda dtype: dtype.itemsize),
            inputs=inputs,
            outputs=own,
        )
        products = (each.P, each.rest_a, each.gram_a, each.S, each.gram_b)
        numbers = each.square, each.shift or 0.0
        if not (all(map(math.isfinite, numbers)) and all(e.isfinite().all() for e in products)):
            raise ValueError(_OVERFLOW)
        found.append(each)
    return found


def _of_inputs(
    own: Sequence[Tensor], inputs: InputStatistics
) -> tuple[list[Tensor], list[Tensor], list[Tensor], torch.dtype]:
    """A·U, A·F and A·Aᵀ of each A, float64; the dtype in which they were made."""
    stacked, ranks = torch.cat(list(own)), [len(A) for A in own]

    def work(dtype: torch.dtype) -> tuple[list[list[Tensor]], list[Tensor]]:
        P, R = (
            torch.zeros(len(stacked), each.shape[1], dtype=torch.float64)
            for each in (inputs.U, inputs.F)
        )
        grams = [torch.zeros(rank, rank, dtype=torch.float64) for rank in ranks]
        for part in _blocks(stacked.shape[1]):
            A = stacked[:, part].to(dtype)
            P += A @ inputs.U[part].to(dtype)
            R += A @ inputs.F[part].to(dtype)
            for gram, each in zip(grams, torch.split(A, ranks), strict=True):
                gram += each @ each.mT
        return [list(torch.split(each, ranks)) for each in (P, R)], grams

    (P, R), grams, dtype = _in_narrowest(work, stacked, inputs.U, inputs.F)
    return P, R, grams, dtype


def _of_outputs(B: Tensor, outputs: OutputStatistics) -> tuple[Tensor, Tensor, torch.dtype]:
    """QᵀB and BᵀB, float64; the dtype in which they were made."""

    def work(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        S = torch.zeros(outputs.Q.shape[1], B.shape[1], dtype=torch.float64)
        gram = torch.zeros(B.shape[1], B.shape[1], dtype=torch.float64)
        for part in _blocks(len(B)):
            own = B[part].to(dtype)
            S += (own.mT @ outputs.Q[part].to(dtype)).mT  # faster than Qᵀ·B
            gram += own.mT @ own
        return S, [gram]

    S, [gram], dtype = _in_narrowest(work, B, outputs.Q)
    return S, gram, dtype


T = TypeVar("T")


def _in_narrowest(
    work: Callable[[torch.dtype], tuple[T, list[Tensor]]], *tensors: Tensor
) -> tuple[T, list[Tensor], torch.dtype]:
    """What `work(dtype)` gives, and dtype: float32 holds products of 16 bits in half the time.

    In float64 if a tensor has more bits, or squares of rows leave float32's range: one factor of an
    update may be as small as the other is large. `work` returns Gram matrices, which show that.
    """
    if all(tensor.itemsize == 2 for tensor in tensors):
        made, grams = work(torch.float32)
        squares = torch.cat([gram.diagonal() for gram in grams])
        low, high = SQUARES
        if bool(squares.min() >= low) and bool(squares.max() <= high):  # NaN is in no range
            return made, grams, torch.float32
    return *work(torch.float64), torch.float64


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
    inputs = found[0].inputs
    Y = [
        (new.P - new.X_a @ each.P) @ inputs.inverse
        for each, new in zip(found, repaired, strict=True)
    ]
    made = _new_a([A for _, A in factors], [new.X_a for new in repaired], inputs.V, Y)
    pairs = []
    for (B, _), each, new, (A, gram_a) in zip(factors, found, repaired, made, strict=True):
        Y_b = each.outputs.inverse @ (new.S - each.S @ new.X_b)
        new_b, gram_b = _new_b(B, new.X_b, each.outputs.Q, Y_b)
        pairs.append(NewFactors(new_b, A, gram_b, gram_a))
    return pairs


def _new_a(
    own: Sequence[Tensor], X: Sequence[Tensor], V: Tensor, Y: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """`X·A + Y·Vᵀ` rounded to the dtype of each A, and the Gram matrix of its rows."""
    ranks = [len(A) for A in own]

    def work(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        made = [torch.empty(A.shape, dtype=A.dtype) for A in own]
        grams = [torch.zeros(rank, rank, dtype=torch.float64) for rank in ranks]
        mixed, together = [each.to(dtype) for each in X], torch.cat(list(Y)).to(dtype)
        for part in _blocks(len(V)):
            sums = torch.split(together @ V[part].to(dtype).mT, ranks)
            rows = zip(made, grams, own, mixed, sums, strict=True)
            for new, gram, A, left, total in rows:
                new[:, part] = total.addmm_(left, A[:, part].to(dtype))
                rounded = new[:, part].to(dtype)
                gram += rounded @ rounded.mT
        return made, grams

    made, grams, _ = _in_narrowest(work, *own, V)
    return list(zip(made, grams, strict=True))


def _new_b(B: Tensor, X: Tensor, Q: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """`B·X + Q·Y` rounded to the dtype of B, and the Gram matrix of its columns."""

    def work(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        new = torch.empty(B.shape, dtype=B.dtype)
        gram = torch.zeros(B.shape[1], B.shape[1], dtype=torch.float64)
        right, more = X.to(dtype), Y.to(dtype)
        for part in _blocks(len(B)):
            total = Q[part].to(dtype) @ more
            new[part] = total.addmm_(B[part].to(dtype), right)
            rounded = new[part].to(dtype)
            gram += rounded.mT @ rounded
        return new, [gram]

    new, [gram], _ = _in_narrowest(work, B, Q)
    return new, gram
