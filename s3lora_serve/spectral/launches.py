"""The launches that solve modules on a device, in their order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import ZERO_ROW
from s3lora_serve.spectral.gram import UNIT
from s3lora_serve.spectral.torch_ops import FLOOR
from s3lora_serve.spectral.upload import Uploaded

PROGRAMS = 528
"""Number of programs that fill a device: four per multiprocessor of a Hopper GPU, which has 132."""

BLOCK_ROWS = 32
"""Rows that a program holds at a time. With 64, too few registers are left for its sums, and on
sm_100 Triton 3.6 takes an instruction without float64."""

FLOAT64 = torch.float64

FIELDS = 5
"""Of a solution, besides its singular values: what `triton_chain.spectrum` stores after them."""


class Launches:
    """The launches for one part, in their order, and the device memory that they share."""

    def __init__(self, uploaded: Uploaded, device: torch.device) -> None:
        self._weights = uploaded.memory
        self._device = device
        self._slots = len(uploaded.factors)
        self._rank = uploaded.factors[0].shape[1]
        self._size = padded_rank(self._rank)
        self._warps = warps(self._size, capability(device))
        tables, counts = _tables(uploaded)
        most = -(-max(counts) // BLOCK_ROWS)
        self._parts = min(max(1, PROGRAMS // self._slots), max(1, most))
        self._groups = self._on_device(tables, counts)

    def solution(self, between_kernels: Callable[[], None]) -> Tensor:
        """Run all; (modules, R + FIELDS) as `triton_chain.spectrum` stores it, on the device.

        The first launch of a kernel compiles it, for seconds.
        """
        from s3lora_serve.spectral import triton_chain, triton_passes

        R, slots, parts = self._size, self._slots, self._parts
        partials = self._empty(slots, parts, R, R)
        lowers, grams = self._empty(slots, R, R), self._empty(slots, R, R)
        stats, sums = self._empty(slots, 2), self._empty(slots, parts, 2)
        out = self._empty(slots // 2, R + FIELDS)
        self._pass(triton_passes.gram, partials)
        between_kernels()
        triton_chain.factorise[(slots,)](
            partials, parts, grams, lowers, stats, self._rank,
            UNIT=UNIT[FLOAT64], ZERO_ROW=ZERO_ROW, R=R, num_warps=self._warps,
        )  # fmt: skip
        between_kernels()
        self._pass(triton_passes.normalised_gram, lowers, partials, sums, FLOOR=FLOOR[FLOAT64])
        between_kernels()
        triton_chain.spectrum[(slots // 2,)](
            partials, sums, parts, self._counts, grams, stats, out, self._rank,
            UNIT=UNIT[FLOAT64], R=R, num_warps=self._warps,
        )  # fmt: skip
        return out

    def _pass(self, kernel: Any, *more: Tensor, **constants: float) -> None:
        """Launch a pass for each dtype and layout."""
        import triton.language as tl

        for (dtype, columns), table in self._groups.items():
            kernel[(len(table), self._parts)](
                self._weights, table, *more, self._rank, **constants,
                DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), COLUMNS=columns,
                BLOCK_D=BLOCK_ROWS, BLOCK_R=self._size, num_warps=self._warps,
            )  # fmt: skip

    def _on_device(
        self, tables: dict[tuple[torch.dtype, bool], list[list[int]]], counts: list[int]
    ) -> dict[tuple[torch.dtype, bool], Tensor]:
        """Upload the tables and the numbers of rows in one copy."""
        rows = [row for table in tables.values() for row in table]
        numbers = torch.tensor(rows + [[count, 0, 0, 0] for count in counts])
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
        moved = numbers.to(self._device, non_blocking=True)
        self._counts = moved[len(rows) :, 0].double()
        lengths = [len(table) for table in tables.values()]
        return dict(zip(tables, torch.split(moved[: len(rows)], lengths), strict=True))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=FLOAT64, device=self._device)


def _tables(
    uploaded: Uploaded,
) -> tuple[dict[tuple[torch.dtype, bool], list[list[int]]], list[int]]:
    """Rows for `triton_passes`, by dtype and layout, and the number of rows of each factor."""
    tables: dict[tuple[torch.dtype, bool], list[list[int]]] = {}
    counts = []
    for slot, (factor, offset) in enumerate(zip(uploaded.factors, uploaded.offsets, strict=True)):
        (count, rank), (row, column) = factor.shape, factor.stride()
        if slot % 2:  # A, of which the kernels take the transpose
            (rank, count), (column, row) = factor.shape, factor.stride()
        columns = row == 1 and (column >= count or rank == 1)
        tables.setdefault((factor.dtype, columns), []).append(
            [offset, count, column if columns else row, slot]
        )
        counts.append(count)
    return tables, counts


def capability(device: torch.device) -> int:
    """The device's generation: 9 for sm_90; 0 in Triton's interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def warps(size: int, generation: int) -> int:
    """Warps of a program on R×R matrices: as many as keep the matrices in registers.

    From sm_100 on, Triton 3.6 takes a tensor-core instruction without float64 for matrices of 64
    rows, and fails, unless a program has more than 8.
    """
    if size == 64 and generation >= 10:
        return 16
    return 4 if size <= 16 else 8


def padded_rank(rank: int) -> int:
    """Side of the matrices of a rank."""
    return max(16, 1 << (rank - 1).bit_length())  # tl.dot requires sides of at least 16
