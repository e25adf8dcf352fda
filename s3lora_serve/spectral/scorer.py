"""Score all modules of an adapter: group them by rank, solve bounded batches, name the results."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.scorer_names import ALIGNMENT, MAS_SVD, OFFLINE, SAFE_LORA, SERVING
from s3lora_serve.spectral import alignment, baselines, dense_reference, fallback, precision
from s3lora_serve.spectral.alignment import Subspace
from s3lora_serve.spectral.low_rank import with_magnitudes
from s3lora_serve.spectral.result import Spectrum, relative_sharpness, spectral_sharpness

_OFFLINE: dict[str, Callable[..., Spectrum]] = {
    "svd": baselines.svd,
    "spsvd": baselines.spsvd,
    "dense": dense_reference.mas_svd,
}
"""Slow scorers for comparison, by name."""


class Factors(NamedTuple):
    """The low-rank factors of one module, as stored: `ΔW = scaling · B · A`."""

    name: str
    B: Tensor  # (m, r)
    A: Tensor  # (r, n)
    scaling: float


@dataclass(frozen=True, slots=True)
class Scorer:
    """All settings that influence a score. Scores are comparable only if these are equal."""

    name: str = MAS_SVD
    rank: int | None = None  # M; None keeps min(r, m, n). Spec of MAS-SVD, step 3
    normalization: str = "two_sided"  # Spec of MAS-SVD, step 2


@dataclass(frozen=True, slots=True)
class ModuleScore:
    """Scores of one module's update. Norms and spectrum are in the units of ΔW."""

    name: str
    finite: bool  # False: the factors contain NaN or Inf, and no other score is meaningful
    ssi: float | None  # None when ΔW = 0
    relative_ssi: float | None  # None when ΔW = 0 or M = 1
    spectrum: tuple[float, ...]  # σ̃, descending
    row_norm_mean: float
    column_norm_mean: float
    frobenius_norm: float
    cancellation: float  # ‖B‖_F·‖A‖_F / ‖B·A‖_F; about √r after training, 1 if a factor is 0
    alignment: float | None = None  # of an alignment scorer; None when ΔW = 0, or no spread
    projected_share: float | None = None  # ‖C·ΔW‖_F² / ‖ΔW‖_F²
    captured: float | None = None  # share of the alignment's energy in the reference

    @property
    def by_alignment(self) -> bool:
        """Whether an alignment scorer ranks the module, and not its sharpness."""
        return self.captured is not None

    @property
    def strip_order(self) -> float | None:
        """What modules are ranked by; the highest are stripped first. None: cannot be ranked."""
        if self.by_alignment:
            return None if self.alignment is None else -self.alignment
        return self.relative_ssi


def score_modules(
    modules: Sequence[Factors],
    scorer: Scorer | None = None,
    *,
    device: str = "auto",
    between_batches: Callable[[], None] = lambda: None,
    subspaces: Sequence[Subspace] = (),
) -> list[ModuleScore]:
    """Score every module with MAS-SVD and the Spectral Sharpness Index, in the order given.

    An alignment scorer adds its own score, which needs a subspace for each module.
    `between_batches` runs before each batch. It may raise to stop scoring, e.g. at a deadline.

    Raises:
        ValueError: the factors of a module do not match, or the scorer is unknown.
    """
    scorer = scorer or Scorer()
    if scorer.name not in (known := (*SERVING, *OFFLINE)):
        raise ValueError(f"expected a scorer of {', '.join(known)}; got {scorer.name!r}")
    scores: dict[int, ModuleScore] = {}
    for indices in _by_rank(modules):
        members = [modules[i] for i in indices]
        counts = [_count(module, scorer.rank) for module in members]
        spectrum, ratio = _spectra(members, counts, scorer, device, between_batches)
        index = spectral_sharpness(spectrum.singular_values)
        columns = (index, *spectrum, ratio)
        values = zip(*(column.tolist() for column in columns), strict=True)
        for i, count, row in zip(indices, counts, values, strict=True):
            scores[i] = _named(modules[i].name, count, *row)
    found = [scores[i] for i in range(len(modules))]
    if scorer.name in ALIGNMENT:
        return _with_alignment(found, modules, scorer, subspaces, device, between_batches)
    return found


def _with_alignment(
    scores: Sequence[ModuleScore],
    modules: Sequence[Factors],
    scorer: Scorer,
    subspaces: Sequence[Subspace],
    device: str,
    between_batches: Callable[[], None],
) -> list[ModuleScore]:
    updates = [(module.B, module.A, module.scaling) for module in modules]
    chosen = resolve_device(device)
    products = None
    if chosen != "cpu":
        on_device = partial(alignment.products, updates, subspaces, device=chosen)
        products = fallback.attempt(on_device, between_batches)
    products = products or alignment.products(updates, subspaces, between_batches)
    found = (
        alignment.cosines(products)
        if scorer.name == SAFE_LORA
        else alignment.e_diems(products, updates, subspaces)
    )
    shares = products.image / products.own
    rows = zip(scores, subspaces, found.tolist(), shares.tolist(), strict=True)
    return [
        replace(
            score,
            alignment=_defined(value),
            projected_share=_defined(share),
            captured=subspace.captured,
        )
        for score, subspace, value, share in rows
    ]


def _spectra(
    modules: Sequence[Factors],
    counts: Sequence[int],
    scorer: Scorer,
    device: str,
    between_batches: Callable[[], None],
) -> tuple[Spectrum, Tensor]:
    """Spectra of modules of one rank, and their `cancellation` (k,)."""
    solution = precision.solve(
        [(module.B, module.A) for module in modules],
        scorer.normalization,
        between_batches,
        resolve_device(device),
    )
    scaling = torch.tensor([module.scaling for module in modules], dtype=torch.float64)
    spectrum = with_magnitudes(solution, scaling, counts, scorer.normalization)
    if scorer.name in OFFLINE:
        # Norms, finiteness and cancellation do not depend on the scorer; only the spectrum does.
        values = spectrum.singular_values
        for i in values[:, 0].isfinite().nonzero().flatten().tolist():
            between_batches()
            values[i, : counts[i]] = _offline(modules[i], counts[i], scorer)
    ratio = torch.where(solution.factors > 0, solution.factors / solution.frobenius, 1.0)
    return spectrum, ratio


def _offline(module: Factors, count: int, scorer: Scorer) -> Tensor:
    """The spectrum of one module from a scorer in OFFLINE."""
    spectrum = _OFFLINE[scorer.name](
        module.B[None],
        module.A[None],
        torch.tensor([module.scaling], dtype=torch.float64),
        rank=count,
        normalization=scorer.normalization,
    )
    return spectrum.singular_values[0]


def _named(
    name: str,
    count: int,
    ssi: float,
    spectrum: list[float],
    row_mean: float,
    column_mean: float,
    frobenius: float,
    cancellation: float,
) -> ModuleScore:
    return ModuleScore(
        name=name,
        finite=math.isfinite(frobenius),
        ssi=_defined(ssi),
        relative_ssi=_defined(relative_sharpness(ssi, count)),
        spectrum=tuple(spectrum[:count]),
        row_norm_mean=row_mean,
        column_norm_mean=column_mean,
        frobenius_norm=frobenius,
        cancellation=cancellation,
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _by_rank(modules: Sequence[Factors]) -> list[list[int]]:
    """Indices of the modules, grouped by rank: the r×r matrices of a group are solved together."""
    alike: dict[int, list[int]] = {}
    for i, module in enumerate(modules):
        if module.B.ndim != 2 or module.A.ndim != 2 or module.B.shape[1] != module.A.shape[0]:
            raise ValueError(
                f"{module.name}: expected B (m, r) and A (r, n), got {tuple(module.B.shape)} and"
                f" {tuple(module.A.shape)}"
            )
        alike.setdefault(module.B.shape[1], []).append(i)
    return list(alike.values())


def _count(module: Factors, rank: int | None) -> int:
    """M of one module."""
    full: int = min(*module.B.shape, module.A.shape[1])
    return full if rank is None else min(rank, full)


def resolve_device(device: str) -> str:
    """Replace `auto` by a device: the CPU.

    CUDA is faster (tests/runs/gpu/RESULTS.md), but its kernels compile for a minute before the
    first adapter, and its context takes memory beside an engine. That is the operator's choice.
    """
    return "cpu" if device == "auto" else device
