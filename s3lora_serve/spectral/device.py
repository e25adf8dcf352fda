"""Modules of one rank on an accelerator: one upload, six launches and one copy back for a part.

Only MAS-SVD's own normalization, and ranks that the kernels hold; the host does all else. The work
is float64 throughout: devices for serving have it at half their float32 speed or better, and
elsewhere the upload takes longer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch

from s3lora_serve.spectral import fallback
from s3lora_serve.spectral.gram import Solution
from s3lora_serve.spectral.launches import FIELDS, FLOAT64, Launches, padded_rank
from s3lora_serve.spectral.panels import FactorPair
from s3lora_serve.spectral.upload import upload

NORMALIZATION = "two_sided"

PART_BYTES = 2**28
"""Device memory for one part, matrices included. An engine leaves a tenth of its device, gigabytes,
for what is not its own. Ours."""

WAITING_SECONDS = 1.0
"""For a turn on the device; the host scores most adapters in that time. Ours."""

_one_at_a_time = threading.Lock()  # the bound on memory is the process's
_warming_up = threading.Event()  # who has the turn compiles: nobody waits for it

DTYPES = {torch.bfloat16, torch.float16, torch.float32, FLOAT64}

MAX_RANK = 64
"""Largest rank whose float64 matrices fit into the registers of one program."""

COMMON = [
    (torch.ones(32, rank, dtype=dtype), torch.ones(rank, 32, dtype=dtype))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for rank in (16, 32, 64)
]
"""What kernels are compiled for at the start of a server."""


def fits(modules: Sequence[FactorPair], normalization: str) -> bool:
    """Whether the kernels can solve these modules of one rank."""
    if find_spec("triton") is None or normalization != NORMALIZATION:
        return False
    dtypes = {factor.dtype for module in modules for factor in module}
    return dtypes <= DTYPES and modules[0][0].shape[1] <= MAX_RANK


def solve(
    modules: Sequence[FactorPair], device: str, between_batches: Callable[[], None]
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
    compiles = _warming_up.is_set()
    if not _one_at_a_time.acquire(timeout=0 if compiles else WAITING_SECONDS):
        late = f"no turn within {WAITING_SECONDS:g} s"
        raise fallback.DeviceBusy("its kernels are being compiled" if compiles else late)
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


def parts(modules: Sequence[FactorPair]) -> Iterator[Sequence[FactorPair]]:
    """Consecutive modules that cost at most PART_BYTES together, or one that costs more."""
    start, total = 0, 0
    for i, module in enumerate(modules):
        if i > start and total + cost(module) > PART_BYTES:
            yield modules[start:i]
            start, total = i, 0
        total += cost(module)
    yield modules[start:]


def cost(module: FactorPair) -> int:
    """Bytes of device memory: the factors, and eight r×r matrices."""
    square = 64 * padded_rank(module[0].shape[1]) ** 2
    return square + sum(factor.numel() * factor.itemsize for factor in module)


def _unsolved(modules: Sequence[FactorPair]) -> Solution:
    k, rank = len(modules), modules[0][0].shape[1]
    return Solution(
        torch.zeros(k, rank, dtype=FLOAT64), *torch.full((FIELDS, k), torch.inf).double()
    )


def _solve(
    modules: Sequence[FactorPair], device: torch.device, between_batches: Callable[[], None]
) -> Solution:
    uploaded = upload(modules, device, between_batches)
    launches = Launches(uploaded, device)
    between_batches()
    found = launches.solution(between_batches).cpu()  # the only time that the host waits
    values = found[:, :-FIELDS].sort(descending=True).values[:, : modules[0][0].shape[1]]
    return Solution(values, *found[:, -FIELDS:].T.clone())
