"""Modules of one rank on an accelerator: one upload, six launches and one copy back for a part.

Only MAS-SVD's own normalization, and ranks that the kernels hold; the host does all else. The work
is float64 throughout: devices for serving have it at half their float32 speed or better, and
elsewhere the upload takes longer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.spectral import fallback
from s3lora_serve.spectral._checks import ZERO_ROW
from s3lora_serve.spectral.gram import UNIT, Solution
from s3lora_serve.spectral.panels import Factors
from s3lora_serve.spectral.torch_ops import FLOOR
from s3lora_serve.spectral.upload import Uploaded, upload

NORMALIZATION = "two_sided"

PART_BYTES = 2**28
"""Device memory for one part, matrices included. An engine leaves a tenth of its device, gigabytes,
for what is not its own. Ours."""

PROGRAMS = 528
"""Number of programs that fill a device: four per multiprocessor of a Hopper GPU, which has 132."""

BLOCK_ROWS = 32
"""Rows that a program holds at a time. With 64, too few registers are left for its sums, and on
sm_100 Triton 3.6 takes an instruction without float64."""

WAITING_SECONDS = 1.0
"""For a turn on the device; the host scores most adapters in that time. Ours."""

_one_at_a_time = threading.Lock()  # the bound on memory is the process's
_warming_up = threading.Event()  # who has the turn compiles: nobody waits for it

FLOAT64 = torch.float64
DTYPES = {torch.bfloat16, torch.float16, torch.float32, FLOAT64}

MAX_RANK = 64
"""Largest rank whose float64 matrices fit into the registers of one program."""

COMMON = [
    (torch.ones(32, rank, dtype=dtype), torch.ones(rank, 32, dtype=dtype))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for rank in (16, 32, 64)
]
"""What kernels are compiled for at the start of a server."""

FIELDS = 5
"""Of a solution, besides its singular values: what `triton_chain.spectrum` stores after them."""


def fits(modules: Sequence[Factors], normalization: str) -> bool:
    """Whether the kernels can solve these modules of one rank."""
    if find_spec("triton") is None or normalization != NORMALIZATION:
        return False
    dtypes = {factor.dtype for module in modules for factor in module}
    return dtypes <= DTYPES and modules[0][0].shape[1] <= MAX_RANK


def solve(
    modules: Sequence[Factors], device: str, between_batches: Callable[[], None]
) -> list[Solution]:
    """Solve modules of one rank, part by part. Modules larger than a part get no error bound.

    Shape: fields of k = len(modules) rows together, float64, on the host.

    Raises:
        DeviceBusy: another thread has used the device for too long.
        torch.OutOfMemoryError: the device has not enough free memory.
        RuntimeError and others: a kernel cannot be compiled or launched.
    """
    with turn(device) as target:
        return [
            _unsolved(part) if cost(part[0]) > PART_BYTES else _solve(part, target, between_batches)
            for part in parts(modules)
        ]


@contextmanager
def turn(device: str) -> Iterator[torch.device]:
    """The device, for this thread alone in this context.

    Raises:
        DeviceBusy: another thread has used it for too long, or compiles its kernels.
    """
    target = torch.device(device)
    # Kernels are launched on the thread's current device.
    current = torch.cuda.device(target) if target.type == "cuda" else nullcontext()
    if not _one_at_a_time.acquire(timeout=0 if _warming_up.is_set() else WAITING_SECONDS):
        compiles = "its kernels are being compiled"
        said = compiles if _warming_up.is_set() else f"no turn within {WAITING_SECONDS:g} s"
        raise fallback.DeviceBusy(said)
    try:
        with current:
            yield target
    finally:
        _one_at_a_time.release()


def warm_up(device: str, between_kernels: Callable[[], None] = lambda: None) -> None:
    """Compile the kernels and load them on the device, so that no adapter waits for that.

    For the ranks and dtypes that adapters commonly have, commonest first. Until all are there, the
    host scores. A failure is that of an adapter: the host scores from then on.

    Raises:
        Whatever `between_kernels` raises.
    """

    def compile_all(between: Callable[[], None]) -> bool:
        with turn(device) as target:
            _warming_up.set()
            try:
                for factors in COMMON:
                    if fits([factors], NORMALIZATION):
                        _solve([factors], target, between)
            finally:
                _warming_up.clear()
        return True

    fallback.attempt(compile_all, between_kernels)


def parts(modules: Sequence[Factors]) -> Iterator[Sequence[Factors]]:
    """Consecutive modules that cost at most PART_BYTES together, or one that costs more."""
    start, total = 0, 0
    for i, module in enumerate(modules):
        if i > start and total + cost(module) > PART_BYTES:
            yield modules[start:i]
            start, total = i, 0
        total += cost(module)
    yield modules[start:]


def cost(module: Factors) -> int:
    """Bytes of device memory: the factors, and eight r×r matrices."""
    square = 64 * _padded_rank(module[0].shape[1]) ** 2
    return square + sum(factor.numel() * factor.itemsize for factor in module)


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


def _padded_rank(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())  # tl.dot requires sides of at least 16


def _unsolved(modules: Sequence[Factors]) -> Solution:
    k, rank = len(modules), modules[0][0].shape[1]
    return Solution(
        torch.zeros(k, rank, dtype=FLOAT64), *torch.full((FIELDS, k), torch.inf).double()
    )


class _Launches:
    """The launches for one part, in their order, and the device memory that they share."""

    def __init__(self, uploaded: Uploaded, device: torch.device) -> None:
        self._weights = uploaded.memory
        self._device = device
        self._slots = len(uploaded.factors)
        self._rank = uploaded.factors[0].shape[1]
        self._size = _padded_rank(self._rank)
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


def _solve(
    modules: Sequence[Factors], device: torch.device, between_batches: Callable[[], None]
) -> Solution:
    uploaded = upload(modules, device, between_batches)
    launches = _Launches(uploaded, device)
    between_batches()
    found = launches.solution(between_batches).cpu()  # the only time that the host waits
    values = found[:, :-FIELDS].sort(descending=True).values[:, : modules[0][0].shape[1]]
    return Solution(values, *found[:, -FIELDS:].T.clone())
