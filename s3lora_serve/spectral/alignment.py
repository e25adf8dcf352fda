"""Scores that compare an update with what alignment changed in the base model.

`V = W_aligned − W_base` of a module, `C = V·Vᵀ/‖V‖_F`, and C = 0 where V = 0. The reference holds
V's leading left singular vectors U (m, k) and singular values σ, so C is replaced by
`C_k = U·diag(σ²)·Uᵀ/‖V‖_F`. Neither C nor ΔW is formed: r×r and k×r matrices are enough. A low
score means: the least aligned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.rotations import frame_blocks

FEWEST_SAMPLES = 8
"""Other modules of one shape from which mean and quartiles are taken; with fewer, rotations are."""

NO_SPREAD = 1e-6
"""Spread of the distances, relative to their mean, under which rounding would decide the score."""

BLOCK_ROWS = 2048
"""Rows of U that are converted to float64 at a time: two megabytes with k = 128."""


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """What a reference holds of one module."""

    U: Tensor  # (m, k), orthonormal up to the rounding of its dtype
    singular_values: Tensor  # (k,) float64, of V, descending
    frobenius: float  # ‖V‖_F of the whole V
    gram: Tensor  # (k, k) float64, UᵀU

    @property
    def captured(self) -> float:
        """Share of V's energy in the subspace: `Σσ_k² / ‖V‖_F²`; 1 if V = 0."""
        if not self.frobenius:
            return 1.0
        return (float(self.singular_values.norm()) / self.frobenius) ** 2

    @property
    def truncation(self) -> float:
        """Bound on `‖C − C_k‖₂` for exact singular vectors.

        `C − C_k` has the eigenvalues `σ_i²/‖V‖_F` for i > k. The largest is at most the last kept,
        and at most all energy that is not captured.
        """
        left_out = max(0.0, 1.0 - self.captured) * self.frobenius**2
        last = float(self.singular_values[-1]) ** 2 if len(self.singular_values) else 0.0
        return min(left_out, last) / self.frobenius if self.frobenius else 0.0


class Products(NamedTuple):
    """What the scores of k modules need of ΔW and of C·ΔW, float64 on the host. NaN: not finite."""

    own: Tensor  # (k,) ‖ΔW‖_F²
    inner: Tensor  # (k,) ⟨C·ΔW, ΔW⟩ ≥ 0
    image: Tensor  # (k,) ‖C·ΔW‖_F²


Update = tuple[Tensor, Tensor, float]
"""B (m, r), A (r, n) and s of `ΔW = s·B·A`; any floating dtype."""


def safe_lora(
    modules: Sequence[Update], subspaces: Sequence[Subspace], device: str = "cpu"
) -> Tensor:
    """`cos(C·ΔW, ΔW)` of each module, in [0, 1]; 0 if C·ΔW = 0, NaN if ΔW = 0 or not finite.

    With `e = Subspace.truncation`, replacing C by C_k changes the cosine by at most
    `2·e·‖ΔW‖_F/‖C_k·ΔW‖_F`.

    Shape: one subspace for each module -> (k,) float64.
    Source: Safe LoRA, arXiv 2405.16833.
    """
    return cosines(products(modules, subspaces, device=device))


def splora(modules: Sequence[Update], subspaces: Sequence[Subspace], device: str = "cpu") -> Tensor:
    """E-DIEM between C·ΔW and ΔW of each module: `(d − mean(D)) / (q₃(D) − q₁(D))`.

    `d = ‖C·ΔW − ΔW‖_F`, and D are the distances of the other modules with ΔW of the same shape. If
    those are fewer than FEWEST_SAMPLES, D are the distances of the module's own update in
    ROTATIONS random orientations: `s·R·B·A` with R orthogonal and uniformly distributed. NaN if
    ΔW = 0 or not finite, or if all of D are equal.

    The paper's factor `v_M − v_m` cancels in its own definition. Replacing C by C_k changes d by at
    most `Subspace.truncation · ‖ΔW‖_F`.

    Shape: one subspace for each module -> (k,) float64.
    Source: SPLoRA, arXiv 2506.18931; the sample set is ours, because the published code's has only
    the pair itself.
    """
    return e_diems(products(modules, subspaces, device=device), modules, subspaces)


def e_diems(found: Products, modules: Sequence[Update], subspaces: Sequence[Subspace]) -> Tensor:
    """`splora` from the products of all modules."""
    distances = distance(found)
    scores = torch.full_like(distances, torch.nan)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (B, A, _) in enumerate(modules):
        if distances[i].isfinite():
            alike.setdefault((len(B), A.shape[1]), []).append(i)
    for members in alike.values():
        if len(members) > FEWEST_SAMPLES:
            scores[members] = _among_others(distances[members])
            continue
        for i in members:
            samples = distance(rotated(modules[i], subspaces[i]))
            scores[i] = detrended(distances[i], samples)
    return torch.where(found.own > 0, scores, torch.nan)


def _among_others(distances: Tensor) -> Tensor:
    """`detrended` of each distance, with all the others as its samples, from one sorting.

    The t-th of the others is the t-th of all, or the next one from a distance's own place on.
    Shape: (n,) -> (n,).
    """
    ordered, order = distances.sort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    others = len(distances) - 1

    def quartile(share: float) -> Tensor:
        at = share * (others - 1)
        low, high = int(at), min(int(at) + 1, others - 1)
        first, second = (ordered[t + (place <= t).long()] for t in (low, high))
        return torch.lerp(first, second, at - low)

    mean = (distances.sum() - distances) / others
    return _score(distances, mean, quartile(0.25), quartile(0.75))


def detrended(distance: Tensor, samples: Tensor) -> Tensor:
    """`(d − mean(D)) / (q₃(D) − q₁(D))`, quartiles by linear interpolation; NaN without spread."""
    low, high = torch.quantile(samples, torch.tensor([0.25, 0.75], dtype=samples.dtype))
    return _score(distance, samples.mean(), low, high)


def _score(distance: Tensor, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    spread = high - low
    return torch.where(spread > NO_SPREAD * mean, (distance - mean) / spread, torch.nan)


def cosines(values: Products) -> Tensor:
    """`inner / √(image · own)`; 0 if the image is 0, NaN if ΔW = 0."""
    size = (values.image * values.own).sqrt()
    found = torch.where(size > 0, values.inner / size, values.own * 0.0)
    return torch.where(values.own > 0, found.clamp(max=1.0), torch.nan)


def distance(values: Products) -> Tensor:
    """`‖C·ΔW − ΔW‖_F`."""
    return (values.image - 2 * values.inner + values.own).clamp_min(0.0).sqrt()


def products(
    modules: Sequence[Update],
    subspaces: Sequence[Subspace],
    between_modules: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> Products:
    """Norms and inner products of ΔW and C·ΔW, for each module: O((m·k + n·r)·r) operations.

    With `P = UᵀB`: `⟨C·ΔW, ΔW⟩ = s²·⟨Pᵀ·σ²·P, A·Aᵀ⟩/‖V‖_F` and
    `‖C·ΔW‖² = s²·⟨(σ²P)ᵀ·UᵀU·(σ²P), A·Aᵀ⟩/‖V‖_F²`.
    """
    found = []
    for (B, A, scaling), subspace in zip(modules, subspaces, strict=True):
        between_modules()
        P, gram_b = _coordinates(subspace.U, B, device)
        A = A.to(device).double()
        found.append(products_of(P[None], gram_b, A @ A.mT, scaling, subspace))
    columns = zip(*found, strict=True) if found else [[torch.zeros(0, dtype=torch.float64)]] * 3
    return Products(*(torch.cat(list(column)).cpu() for column in columns))


def rotated(module: Update, subspace: Subspace) -> Products:
    """Products of `s·R·B·A` in the seeded random orientations R of `frame_blocks`.

    Only UᵀRB matters. With `B = F·L` and orthonormal F, it is a block UᵀRF of a frame, times L.
    """
    B, A, scaling = module
    B, A = B.double(), A.double()
    gram_b = B.mT @ B
    values, vectors = torch.linalg.eigh(gram_b)
    rank = min(B.shape)
    root = (values.clamp_min(0.0).sqrt().unsqueeze(-1) * vectors.mT)[-rank:]  # LᵀL = BᵀB
    P = frame_blocks(len(B), subspace.U.shape[1], rank) @ root
    return products_of(P, gram_b, A @ A.mT, scaling, subspace)


def _coordinates(U: Tensor, B: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """UᵀB (k, r) and BᵀB (r, r) in float64, in passes over blocks of rows."""
    rows = len(B) if device != "cpu" else BLOCK_ROWS
    rank = B.shape[1]
    # BᵀU and not UᵀB: a quarter faster, since the long side of the result is the inner one.
    P = torch.zeros(rank, U.shape[1], dtype=torch.float64, device=device)
    gram = torch.zeros(rank, rank, dtype=torch.float64, device=device)
    for at in range(0, len(B), max(1, rows)):
        part = B[at : at + rows].to(device).double()
        P.addmm_(part.mT, U[at : at + rows].to(device).double())
        gram.addmm_(part.mT, part)
    return P.mT, gram


def products_of(
    P: Tensor, gram_b: Tensor, gram_a: Tensor, scaling: float, subspace: Subspace
) -> Products:
    """Products of one module for each of its coordinates P (c, k, r) -> fields (c,)."""
    device = P.device
    squares = subspace.singular_values.to(device).square().unsqueeze(-1)
    weighted = squares * P
    square = scaling**2
    own = (gram_b * gram_a).sum().clamp_min(0.0).expand(len(P))
    inner = ((P.mT @ weighted) * gram_a).sum((-1, -2)).clamp_min(0.0)
    image = (weighted.mT @ subspace.gram.to(device) @ weighted * gram_a).sum((-1, -2))
    over = 1 / subspace.frobenius if subspace.frobenius else 0.0
    return Products(square * own, square * over * inner, square * over**2 * image.clamp_min(0.0))
