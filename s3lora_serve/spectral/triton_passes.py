"""The two passes over LoRA factors in device memory, as Triton kernels: twins of `torch_ops`.

Import this module only with a CUDA device or Triton's interpreter. One launch takes all factors of
one dtype and layout, of any number of rows. A program loads tiles of rows of one factor, multiplies
and adds them in float64, and stores its sums separately: the result is bitwise independent of the
order of execution.

`table` has a row (offset in bytes in `weights`, number of rows d, stride, slot) for each factor.
Factor X (d, r) is stored by rows, at `offset + i·stride + j`, or by COLUMNS, at
`offset + j·stride + i`, in elements. Slots 2i and 2i + 1 are the B and the Aᵀ of module i.
"""

import triton
import triton.language as tl

from s3lora_serve.spectral.triton_chain import save, square_index

ROW = tl.constexpr(4)
"""Numbers in a row of the table."""


@triton.jit
def tile(
    weights, entry, number, rank,
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_D rows of a factor in float64, padded with zeros to (BLOCK_D, BLOCK_R)."""
    x = (weights + tl.load(entry)).to(tl.pointer_type(DTYPE))
    stride = tl.load(entry + 2)
    rows = number * BLOCK_D + tl.arange(0, BLOCK_D)[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK_R)[None, :].to(tl.int64)
    at = rows + columns * stride if COLUMNS else rows * stride + columns
    X = tl.load(x + at, mask=(rows < tl.load(entry + 1)) & (columns < rank), other=0.0)
    # The sum over one element hides from Triton 3.6 that X had 16 bits: it would choose an
    # instruction for them that the product of float64 does not have, and fail.
    return tl.sum(X.to(tl.float64)[:, :, None], 2)


@triton.jit(do_not_specialize=["rank"])
def gram(
    weights, table, grams, rank,
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Xᵀ·X` of each factor. Stores (slots, parts, R, R) float64, the sums of each program."""
    entry = table + tl.program_id(0) * ROW
    part, parts = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    for number in range(part, tl.cdiv(tl.load(entry + 1), BLOCK_D), parts):
        X = tile(weights, entry, number, rank, DTYPE, COLUMNS, BLOCK_D, BLOCK_R)
        total += tl.dot(tl.trans(X), X, out_dtype=tl.float64)
    save(grams, tl.load(entry + 3) * parts + part, total, BLOCK_R)


@triton.jit(do_not_specialize=["rank"])
def normalised_gram(
    weights, table, lower, grams, sums, rank, FLOOR: tl.constexpr,
    DTYPE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Σ_i x_i·x_iᵀ / ρ_i²`, `Σ_i ρ_i` with `ρ_i = ‖x_iᵀ·L‖₂`, and the number of rows lost.

    L is the Cholesky factor of the module's other side. A row is lost if it is not zero and its ρ²
    is below FLOOR: its weight would be noise. Stores (slots, parts, R, R) and (slots, parts, 2).
    """
    entry = table + tl.program_id(0) * ROW
    part, parts = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(entry + 3)
    L = tl.load(lower + (slot ^ 1) * BLOCK_R * BLOCK_R + square_index(BLOCK_R))
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    norms = tl.zeros((BLOCK_D,), tl.float64)
    lost = tl.zeros((BLOCK_D,), tl.float64)
    for number in range(part, tl.cdiv(tl.load(entry + 1), BLOCK_D), parts):
        X = tile(weights, entry, number, rank, DTYPE, COLUMNS, BLOCK_D, BLOCK_R)
        images = tl.dot(X, L, out_dtype=tl.float64)
        squares = tl.sum(images * images, 1)
        lost += ((squares < FLOOR) & (tl.max(tl.abs(X), 1) > 0)).to(tl.float64)
        norms += tl.sqrt(squares)
        X = X / tl.sqrt(tl.maximum(squares, FLOOR))[:, None]
        total += tl.dot(tl.trans(X), X, out_dtype=tl.float64)
    program = slot * parts + part
    save(grams, program, total, BLOCK_R)
    tl.store(sums + 2 * program, tl.sum(norms, 0))
    tl.store(sums + 2 * program + 1, tl.sum(lost, 0))
