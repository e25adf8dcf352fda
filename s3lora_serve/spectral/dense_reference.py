"""All scores on the dense update in float64, exactly as defined. Slow; for tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import EQUILIBRATION_SWEEPS, ZERO_ROW, check_factors, in_range
from s3lora_serve.spectral.alignment import FEWEST_SAMPLES, NO_SPREAD, Subspace, Update
from s3lora_serve.spectral.result import Spectrum
from s3lora_serve.spectral.rotations import frame_blocks


def mas_svd(
    B: Tensor,
    A: Tensor,
    scaling: Tensor,
    *,
    rank: int | None = None,
    normalization: str = "two_sided",
) -> Spectrum:
    """Magnitude-aware spherically normalised spectrum of `ΔW = s·B·A`, dense.

    `σ̃_k = r̄ · c̄ · σ_k(D_ρ⁺ · ΔW · D_γ⁺)`, for the leading `rank` values (default: all).
    `row` and `column` normalise one side only and multiply by the mean of that side.

    Shape: B (k, m, r), A (k, r, n), scaling (k,); any floating dtype.
    Source: arXiv 2508.15068 (MAS-SVD), arXiv 2402.09754 (spherical normalisation).

    Raises:
        ValueError: a shape, dtype or option is invalid.
    """
    count = check_factors(B, A, scaling, rank, normalization)
    per_module = [
        _one(b.double(), a.double(), s.double(), count, normalization)
        for b, a, s in zip(B, A, scaling, strict=True)
    ]
    if not per_module:
        empty = B.new_zeros(0, dtype=torch.float64)
        return Spectrum(empty.reshape(0, count), empty, empty, empty)
    return Spectrum(*(torch.stack(values) for values in zip(*per_module, strict=True)))


def _one(B: Tensor, A: Tensor, s: Tensor, count: int, normalization: str) -> tuple[Tensor, ...]:
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()) or not torch.isfinite(s):
        bad = torch.full((), torch.nan, dtype=torch.float64)
        return bad.expand(count), bad, bad, bad
    (B, b), (A, a) = in_range(B), in_range(A)
    size = b * a
    update = s * (B @ A)
    rows = _norms(update, 1, s.abs() * B.norm(dim=1) * A.norm())
    columns = _norms(update, 0, s.abs() * A.norm(dim=0) * B.norm())
    row_mean = rows.mean() if rows.numel() else rows.sum()
    column_mean = columns.mean() if columns.numel() else columns.sum()
    keep_rows, keep_columns = _inverse(rows) > 0, _inverse(columns) > 0

    normalised, magnitude = update, row_mean * column_mean
    if normalization == "equilibrated":
        for _ in range(EQUILIBRATION_SWEEPS):
            normalised = keep_rows[:, None] * _inverse(normalised.norm(dim=1))[:, None] * normalised
            normalised = normalised * _inverse(normalised.norm(dim=0)) * keep_columns
    else:
        if normalization in ("two_sided", "row"):
            normalised = _inverse(rows)[:, None] * normalised
        if normalization in ("two_sided", "column"):
            normalised = normalised * _inverse(columns)
        if normalization == "row":
            magnitude = row_mean
        if normalization == "column":
            magnitude = column_mean

    values = torch.linalg.svdvals(normalised)[:count] if update.numel() else update.new_zeros(count)
    values = magnitude * size * values * (size if normalization == "equilibrated" else 1.0)
    return values, size * row_mean, size * column_mean, size * update.norm()


def _norms(update: Tensor, dim: int, cancelled: Tensor) -> Tensor:
    """Norms along `dim`; those at or below `ZERO_ROW · cancelled` are noise and set to zero."""
    norms = update.norm(dim=dim)
    return torch.where(norms > ZERO_ROW * cancelled, norms, 0.0)


def _inverse(norms: Tensor) -> Tensor:
    """Moore-Penrose inverse of a vector of norms: zero stays zero."""
    return torch.where(norms > 0, 1.0 / norms, 0.0)


def safe_lora(modules: Sequence[Update], subspaces: Sequence[Subspace]) -> Tensor:
    """`cos(C·ΔW, ΔW)` with dense `C = U·diag(σ²)·Uᵀ/‖V‖_F` and ΔW; NaN if ΔW = 0.

    Shape: one subspace for each module -> (k,) float64.
    Source: Safe LoRA, arXiv 2405.16833.
    """
    return torch.stack([_cosine(*_pair(m, s)) for m, s in zip(modules, subspaces, strict=True)])


def splora(modules: Sequence[Update], subspaces: Sequence[Subspace]) -> Tensor:
    """E-DIEM between dense C·ΔW and ΔW, with the sample set of `alignment.splora`.

    Shape: one subspace for each module -> (k,) float64.
    Source: SPLoRA, arXiv 2506.18931.
    """
    pairs = [_pair(m, s) for m, s in zip(modules, subspaces, strict=True)]
    distances = [(image - update).norm() for image, update in pairs]
    scores = []
    for i, (own, (_, update)) in enumerate(zip(distances, pairs, strict=True)):
        samples = [
            distance
            for j, distance in enumerate(distances)
            if j != i and pairs[j][1].shape == update.shape and distance.isfinite()
        ]
        if len(samples) < FEWEST_SAMPLES:
            samples = _rotated_distances(modules[i], subspaces[i])
        low, high = torch.quantile(torch.stack(samples), update.new_tensor([0.25, 0.75]))
        mean = torch.stack(samples).mean()
        defined = update.norm() > 0 and high - low > NO_SPREAD * mean
        scores.append((own - mean) / (high - low) if defined else own * torch.nan)
    return torch.stack(scores)


def _pair(module: Update, subspace: Subspace) -> tuple[Tensor, Tensor]:
    """C·ΔW and ΔW, dense."""
    B, A, scaling = module
    return _alignment(subspace) @ (update := scaling * B.double() @ A.double()), update


def _alignment(subspace: Subspace) -> Tensor:
    U = subspace.U.double()
    if not subspace.frobenius:
        return U.new_zeros(len(U), len(U))
    C: Tensor = U * subspace.singular_values.square() @ U.mT / subspace.frobenius
    return C


def _cosine(image: Tensor, update: Tensor) -> Tensor:
    sizes = image.norm() * update.norm()
    if sizes > 0:
        cosine: Tensor = (image * update).sum() / sizes
        return cosine
    return torch.where(update.norm() > 0, 0.0, torch.nan).double()


def _rotated_distances(module: Update, subspace: Subspace) -> list[Tensor]:
    """Distances of the update in the orientations of `frame_blocks`, each with its whole frame."""
    B, A, scaling = module
    U = subspace.U.double()
    rank = min(B.shape)
    values, vectors = torch.linalg.eigh(B.double().mT @ B.double())
    root = (values.clamp_min(0.0).sqrt().unsqueeze(-1) * vectors.mT)[-rank:]
    outside = torch.linalg.qr(U, mode="complete").Q[:, U.shape[1] :]
    distances = []
    for block in frame_blocks(len(B), U.shape[1], rank):
        inside = U @ torch.linalg.solve(U.mT @ U, block)  # UᵀF = block
        rest, found = torch.linalg.eigh(torch.eye(rank).double() - inside.mT @ inside)
        rest = (rest.clamp_min(0.0).sqrt().unsqueeze(-1) * found.mT)[-outside.shape[1] :]
        frame = inside + outside[:, : len(rest)] @ rest if outside.shape[1] else inside
        update = scaling * frame @ root @ A.double()
        distances.append((_alignment(subspace) @ update - update).norm())
    return distances


def input_projection(
    B: Tensor, A: Tensor, scaling: float, C_h: Tensor, C_b: Tensor, lam: float
) -> Tensor:
    """`ΔW' = ΔW·λ·C_b·(C_h + λ·C_b)⁻¹`, dense: (m, n) float64.

    Shape: C_h and C_b (n, n) float64; C_b is regular.
    """
    update = scaling * B.double() @ A.double()
    weighted: Tensor = torch.linalg.solve(C_h + lam * C_b, lam * C_b @ update.mT).mT
    return weighted


def repair_loss(
    update: Tensor, new: Tensor, C_h: Tensor, C_b: Tensor, G: Tensor, lam: float
) -> Tensor:
    """`tr(G·ΔW'·C_h·ΔW'ᵀ) + λ·tr((ΔW' − ΔW)·C_b·(ΔW' − ΔW)ᵀ)` of dense updates."""
    harm = (G @ new @ C_h * new).sum()
    lost = ((new - update) @ C_b * (new - update)).sum()
    return harm + lam * lost


def energy(update: Tensor, covariance: Tensor) -> float:
    """`tr(ΔW·C·ΔWᵀ) = E‖ΔW·x‖²` of a dense update on inputs of a covariance."""
    return float((update @ covariance * update).sum())
