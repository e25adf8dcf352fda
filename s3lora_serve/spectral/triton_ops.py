"""The two passes over a LoRA factor, as Triton kernels: the twins of `torch_ops`.

Import this module only with a CUDA device or Triton's interpreter. A program loads tiles of rows of
one module, multiplies in the working dtype, and adds the tiles in float64. Each program stores its
sums separately, so the result is bitwise independent of the order of execution.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3lora_serve.spectral.torch_ops import FLOOR

MAX_RANK = 64
"""Largest rank at which a whole row and its float64 sums fit into the registers of one program."""

PROGRAMS = 528
"""Number of programs that fill a device: four per multiprocessor of a Hopper GPU, which has 132."""


def gram(X: Tensor, dtype: torch.dtype) -> Tensor:
    """`Xᵀ·X` of each matrix in a batch.

    Shape: X (k, d, r), any strides and floating dtype, r ≤ MAX_RANK -> (k, r, r) float64. Products
    use `dtype`, float32 or float64; sums over tiles of rows use float64.
    """
    sums = _Partials(X)
    _gram[sums.grid](
        X, sums.grams, X.shape[1], X.shape[2], *X.stride(), sums.tiles,
        WORK=_WORK[dtype], BLOCK_D=sums.block_d, BLOCK_R=sums.block_r,
    )  # fmt: skip
    return sums.total()


def normalised_gram(
    X: Tensor,
    lower: Tensor,
    scratch: Tensor | None = None,  # noqa: ARG001 - only the twin needs it; kernels use registers
) -> tuple[Tensor, Tensor, Tensor]:
    """`Σ_i x_i·x_iᵀ / ρ_i²`, `Σ_i ρ_i` with `ρ_i = ‖x_iᵀ·lower‖₂`, and the number of rows lost.

    A row is lost if it is not zero and its ρ² is below FLOOR: its weight would be noise. All three
    results come from one pass.

    Shape: X (k, d, r), any strides and floating dtype, r ≤ MAX_RANK, lower (k, r, r) in the working
    dtype, float32 or float64 -> (k, r, r), (k,), (k,) float64.
    """
    sums = _Partials(X)
    lower = lower.contiguous()
    _normalised_gram[sums.grid](
        X, lower, sums.grams, sums.norms, sums.lost, X.shape[1], X.shape[2], *X.stride(),
        sums.tiles, FLOOR=FLOOR[lower.dtype], WORK=_WORK[lower.dtype],
        BLOCK_D=sums.block_d, BLOCK_R=sums.block_r,
    )  # fmt: skip
    return sums.total(), sums.norms.sum(1), sums.lost.sum(1)


_WORK = {torch.float32: tl.float32, torch.float64: tl.float64}


class _Partials:
    """The division of a batch into programs, and the float64 sums that each program stores."""

    def __init__(self, X: Tensor) -> None:
        k, d, self._rank = X.shape
        # `tl.dot` requires tile sides of at least 16.
        self.block_r = max(16, triton.next_power_of_2(self._rank))
        self.block_d = 128 if self.block_r <= 16 else 64
        tiles = max(1, triton.cdiv(d, self.block_d))
        self.tiles = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // max(1, k))))
        parts = triton.cdiv(tiles, self.tiles)
        self.grid = (k, parts)

        def empty(*shape: int) -> Tensor:
            return torch.empty(k, parts, *shape, dtype=torch.float64, device=X.device)

        self.grams = empty(self.block_r, self.block_r)
        self.norms, self.lost = empty(), empty()

    def total(self) -> Tensor:
        return self.grams.sum(1)[:, : self._rank, : self._rank]


@triton.jit
def _tile(
    x, tile, d, r, stride_d, stride_r,
    WORK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_D rows, padded with zeros to (BLOCK_D, BLOCK_R)."""
    rows = (tile * BLOCK_D + tl.arange(0, BLOCK_D))[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK_R)[None, :].to(tl.int64)
    inside = (rows < d) & (columns < r)
    return tl.load(x + rows * stride_d + columns * stride_r, mask=inside, other=0.0).to(WORK)


@triton.jit
def _square(X, WORK: tl.constexpr):
    """`Xᵀ·X` of one tile, without rounding to tf32."""
    return tl.dot(tl.trans(X), X, input_precision="ieee", out_dtype=WORK).to(tl.float64)


@triton.jit
def _save(out, total, BLOCK_R: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out + program * BLOCK_R * BLOCK_R + rows * BLOCK_R + columns, total)


@triton.jit
def _gram(
    x, grams, d, r, stride_k, stride_d, stride_r, tiles,
    WORK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    x += tl.program_id(0).to(tl.int64) * stride_k
    first = tl.program_id(1) * tiles
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(d, BLOCK_D))):
        total += _square(_tile(x, tile, d, r, stride_d, stride_r, WORK, BLOCK_D, BLOCK_R), WORK)
    _save(grams, total, BLOCK_R)


@triton.jit
def _normalised_gram(
    x, lower, grams, norms, lost, d, r, stride_k, stride_d, stride_r, tiles,
    FLOOR: tl.constexpr, WORK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    module = tl.program_id(0).to(tl.int64)
    x += module * stride_k
    L = _tile(lower + module * r * r, 0, r, r, r, 1, WORK, BLOCK_R, BLOCK_R)
    first = tl.program_id(1) * tiles
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    sum_of_norms = tl.zeros((BLOCK_D,), tl.float64)
    rows_lost = tl.zeros((BLOCK_D,), tl.float64)
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(d, BLOCK_D))):
        X = _tile(x, tile, d, r, stride_d, stride_r, WORK, BLOCK_D, BLOCK_R)
        images = tl.dot(X, L, input_precision="ieee", out_dtype=WORK)
        squares = tl.sum(images * images, 1)
        present = tl.max(tl.abs(X), 1) > 0
        rows_lost += ((squares < FLOOR) & present).to(tl.float64)
        sum_of_norms += tl.sqrt(squares).to(tl.float64)
        norms_or_floor = tl.sqrt(tl.maximum(squares, FLOOR))
        total += _square((X / norms_or_floor[:, None]).to(WORK), WORK)
    _save(grams, total, BLOCK_R)
    program = module * tl.num_programs(1) + tl.program_id(1)
    tl.store(norms + program, tl.sum(sum_of_norms, 0))
    tl.store(lost + program, tl.sum(rows_lost, 0))
