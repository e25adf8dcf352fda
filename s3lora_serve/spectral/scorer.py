"""Score the modules of a whole adapter: group them by shape, run bounded batches, name results."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.low_rank import mas_svd
from s3lora_serve.spectral.result import relative_sharpness, spectral_sharpness

BATCH_BYTES = 64 * 2**20
"""Float64 working set of one batch: it bounds memory, and the time between two deadline checks."""


class Factors(NamedTuple):
    """The low-rank factors of one module, as stored: `ΔW = scaling · B · A`."""

    name: str
    B: Tensor  # (m, r)
    A: Tensor  # (r, n)
    scaling: float


@dataclass(frozen=True, slots=True)
class Scorer:
    """Everything that influences a score, so that two scores are only compared if these agree."""

    name: str = "mas-svd"
    rank: int | None = None  # M; None keeps min(r, m, n). Spec of MAS-SVD, step 3
    normalization: str = "two_sided"  # Spec of MAS-SVD, step 2


@dataclass(frozen=True, slots=True)
class ModuleScore:
    """What is known about one module's update. Norms and spectrum are in the units of ΔW."""

    name: str
    finite: bool  # False: the factors hold NaN or Inf, and nothing else here means anything
    ssi: float | None  # None when ΔW = 0
    relative_ssi: float | None  # None when ΔW = 0 or M = 1
    spectrum: tuple[float, ...]  # σ̃, descending
    row_norm_mean: float
    column_norm_mean: float
    frobenius_norm: float


def score_modules(
    modules: Sequence[Factors],
    scorer: Scorer | None = None,
    *,
    device: str = "auto",
    between_batches: Callable[[], None] = lambda: None,
) -> list[ModuleScore]:
    """Score every module with MAS-SVD and the Spectral Sharpness Index, in the order given.

    `between_batches` runs before each batch and may raise to stop (deadlines).

    Raises:
        ValueError: a module's factors do not fit each other, or the scorer is unknown.
    """
    scorer = scorer or Scorer()
    if scorer.name != "mas-svd":
        raise ValueError(f"expected scorer 'mas-svd', got {scorer.name!r}")
    target = torch.device(_resolve_device(device))
    scores: dict[int, ModuleScore] = {}
    for batch in _batches(modules):
        between_batches()
        members = [modules[i] for i in batch]
        spectrum = mas_svd(
            torch.stack([module.B for module in members]).to(target),
            torch.stack([module.A for module in members]).to(target),
            torch.tensor([module.scaling for module in members], dtype=torch.float64).to(target),
            rank=scorer.rank,
            normalization=scorer.normalization,
        )
        index = spectral_sharpness(spectrum.singular_values)
        relative = relative_sharpness(index, spectrum.singular_values.shape[-1])
        columns = (index, relative, *spectrum)
        for i, row in zip(batch, zip(*(c.tolist() for c in columns), strict=True), strict=True):
            scores[i] = _named(modules[i].name, *row)
    return [scores[i] for i in range(len(modules))]


def _named(
    name: str,
    ssi: float,
    relative: float,
    spectrum: list[float],
    row_mean: float,
    column_mean: float,
    frobenius: float,
) -> ModuleScore:
    return ModuleScore(
        name=name,
        finite=math.isfinite(frobenius),
        ssi=_defined(ssi),
        relative_ssi=_defined(relative),
        spectrum=tuple(spectrum),
        row_norm_mean=row_mean,
        column_norm_mean=column_mean,
        frobenius_norm=frobenius,
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _batches(modules: Sequence[Factors]) -> Iterator[list[int]]:
    """Indices of modules that share shape and dtype, at most BATCH_BYTES of float64 at a time."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (_, B, A, _) in enumerate(modules):
        alike.setdefault((B.shape, A.shape, B.dtype, A.dtype), []).append(i)
    for indices in alike.values():
        first = modules[indices[0]]
        each = 8 * (first.B.numel() + first.A.numel())
        size = max(1, BATCH_BYTES // max(each, 1))
        yield from (indices[at : at + size] for at in range(0, len(indices), size))


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
