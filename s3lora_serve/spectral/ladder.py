"""The ladder: each module gets the fastest arithmetic that can vouch for its index.

float32 Grams, then float64 Grams, then QR in float64; a module climbs when `doubt` is too large.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from s3lora_serve.spectral import gram, orthogonal
from s3lora_serve.spectral.gram import DOUBT, FLOAT32_RANK, Factors, Solution

GRAM_BYTES = 2**25
"""Gram matrices held at a time; four of r×r float64 a module, and as much again in passing."""


def solve(
    modules: Sequence[Factors],
    normalization: str,
    between_batches: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> Solution:
    """Solve modules of one rank and any shapes and dtypes, in the order given.

    A module whose factors are not finite comes back as NaN. Extra memory does not grow with the
    adapter.

    Shape: B (m, r), A (r, n) each -> fields of k = len(modules) rows, float64.
    """
    rank = modules[0][0].shape[1]
    size = max(1, GRAM_BYTES // (32 * rank * rank))
    parts = [
        _climb(modules[at : at + size], normalization, between_batches, device)
        for at in range(0, len(modules), size)
    ]
    return _cat(parts)


def _climb(
    modules: Sequence[Factors],
    normalization: str,
    between_batches: Callable[[], None],
    device: str,
) -> Solution:
    steps: list[Callable[..., Solution]] = [partial(gram.solve, dtype=torch.float64), _qr]
    if modules[0][0].shape[1] >= FLOAT32_RANK:
        steps.insert(0, partial(gram.solve, dtype=torch.float32))
    more = {"between_batches": between_batches, "device": device}
    solution = steps[0](modules, normalization, **more)
    for again in steps[1:]:
        doubtful = (~(solution.doubt <= DOUBT)).nonzero().flatten()
        if doubtful.numel():
            better = again([modules[i] for i in doubtful], normalization, **more)
            for kept, value in zip(solution, better, strict=True):
                kept[doubtful] = value
    return solution


def _qr(
    modules: Sequence[Factors],
    normalization: str,
    between_batches: Callable[[], None],
    device: str,  # noqa: ARG001 - a step of the ladder like the others
) -> Solution:
    """One by one on the CPU: what is left is rare, and zero, not finite, or nearly singular."""
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
    return orthogonal.solve(B, A, normalization)


def _constant(rank: int, value: float) -> Solution:
    one = torch.full((1,), value, dtype=torch.float64)
    return Solution(one.expand(1, rank), one, one, one, one, torch.zeros_like(one))


def _cat(parts: Sequence[Solution]) -> Solution:
    return Solution(*(torch.cat(values) for values in zip(*parts, strict=True)))
