"""Choice of precision: each module gets the fastest arithmetic whose error bound is small enough.

On the host the arithmetics are float32 Grams, float64 Grams, and QR in float64, tried in this
order. A device has float64 Grams alone, and the host what they are not exact enough for.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from s3lora_serve.spectral import device as devices
from s3lora_serve.spectral import fallback, gram, qr
from s3lora_serve.spectral._checks import in_range
from s3lora_serve.spectral.gram import MAX_ERROR_BOUND, Solution
from s3lora_serve.spectral.panels import FactorPair, HostModules

GRAM_BYTES = 2**25
"""Bytes of Gram matrices held at a time: four r×r float64 matrices per module. Temporaries take as
much again."""


def solve(
    modules: Sequence[FactorPair],
    normalization: str,
    between_batches: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> Solution:
    """Solve modules of one rank and any shapes and dtypes, in the order given.

    The values of a module with non-finite factors are NaN. Extra memory does not grow with the
    size of the adapter. If the device fails, the host solves all modules.

    Shape: B (m, r), A (r, n) each -> fields of k = len(modules) rows, float64, on the host.
    """
    if device != "cpu" and devices.fits(modules, normalization):
        solved = fallback.attempt(partial(devices.solve, modules, device), between_batches)
        if solved is not None:
            return _again(_cat(solved), modules, normalization, between_batches)
    return _solve_on_host(modules, normalization, between_batches)


def _parts(modules: Sequence[FactorPair]) -> Iterator[Sequence[FactorPair]]:
    rank = modules[0][0].shape[1]
    size = max(1, GRAM_BYTES // (32 * rank * rank))
    for at in range(0, len(modules), size):
        yield modules[at : at + size]


def _again(
    solution: Solution,
    modules: Sequence[FactorPair],
    normalization: str,
    between_batches: Callable[[], None],
) -> Solution:
    """Solve the modules again on the host whose error bound on the device is too large."""
    if inexact := _inexact(solution):
        chosen = [modules[i] for i in inexact]
        _replace(solution, inexact, _solve_on_host(chosen, normalization, between_batches))
    return solution


def _solve_on_host(
    modules: Sequence[FactorPair], normalization: str, between_batches: Callable[[], None]
) -> Solution:
    return _cat([_solve_part(part, normalization, between_batches) for part in _parts(modules)])


def _solve_part(
    modules: Sequence[FactorPair], normalization: str, between_batches: Callable[[], None]
) -> Solution:
    place = HostModules(modules, between_batches)

    def grams(chosen: Sequence[int], dtype: torch.dtype) -> Solution:
        return gram.solve(*place.sides(chosen, dtype), normalization)

    def by_qr(chosen: Sequence[int]) -> Solution:
        return _solve_by_qr([modules[i] for i in chosen], normalization, between_batches)

    fastest, *slower = place.arithmetics
    solution = grams(range(len(modules)), fastest)
    steps: list[Callable[[Sequence[int]], Solution]] = [partial(grams, dtype=d) for d in slower]
    for again in (*steps, by_qr):
        if inexact := _inexact(solution):
            _replace(solution, inexact, again(inexact))
    return solution


def _inexact(solution: Solution) -> list[int]:
    found: list[int] = (~(solution.error_bound <= MAX_ERROR_BOUND)).nonzero().flatten().tolist()
    return found


def _replace(solution: Solution, places: list[int], by: Solution) -> None:
    for kept, value in zip(solution, by, strict=True):
        kept[places] = value


def _solve_by_qr(
    modules: Sequence[FactorPair], normalization: str, between_batches: Callable[[], None]
) -> Solution:
    """Solve modules one by one on the CPU.

    These modules are rare: they are zero, not finite, or nearly singular.
    """
    solved = []
    for B, A in modules:
        between_batches()
        solved.append(_one(B[None].double(), A[None].double(), normalization))
    return _cat(solved)


def _one(B: Tensor, A: Tensor, normalization: str) -> Solution:
    if not (B.isfinite().all() and A.isfinite().all()):
        return _constant(B.shape[-1], torch.nan)
    if not (B.any() and A.any()):
        return _constant(B.shape[-1], 0.0)
    (B, b), (A, a) = in_range(B), in_range(A)
    solution = qr.solve(B, A, normalization)
    # Two-sided X is ΔW divided by two norms of ΔW, so σ(X) scales with 1/(b·a). The other forms
    # of X do not depend on the scale.
    over = b * a if normalization == "two_sided" else 1.0
    return solution._replace(
        normalised=solution.normalised / over,
        row_mean=solution.row_mean * b * a,
        column_mean=solution.column_mean * b * a,
        frobenius=solution.frobenius * b * a,
        factors=solution.factors * b * a,
    )


def _constant(rank: int, value: float) -> Solution:
    one = torch.full((1,), value, dtype=torch.float64)
    return Solution(one.expand(1, rank), one, one, one, one, torch.zeros_like(one))


def _cat(parts: Sequence[Solution]) -> Solution:
    return Solution(*(torch.cat(values) for values in zip(*parts, strict=True)))
