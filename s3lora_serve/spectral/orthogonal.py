"""The QR route: the same solution from orthogonal factors, exact where Gram matrices drown.

Slower than the Gram route; taken only by modules whose `doubt` there exceeds the accuracy promised.
"""

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import EQUILIBRATION_SWEEPS, ZERO_ROW
from s3lora_serve.spectral.gram import Solution


def solve(B: Tensor, A: Tensor, normalization: str) -> Solution:
    """Singular values of `X = D_ρ⁺·B·A·D_γ⁺` from thin QRs; same meaning as `gram.solve`.

    With Aᵀ = Q·R the update is (B·Rᵀ)·Qᵀ: the rows of B·Rᵀ have the norms ρ_i themselves, so
    whatever cancels between B and A has cancelled before anything is squared or divided.

    Shape: B (k, m, r), A (k, r, n), float64 and finite.
    """
    row_bounds = B.norm(dim=-1) * torch.linalg.matrix_norm(A).unsqueeze(-1)
    column_bounds = A.norm(dim=-2) * torch.linalg.matrix_norm(B).unsqueeze(-1)
    left_core = _core(B)  # (k, p, r)
    right_basis, right_core = torch.linalg.qr(A.mT)  # (k, n, q), (k, q, r)
    left = B @ right_core.mT  # (k, m, q): row norms are ρ
    right = left_core @ A  # (k, p, n): column norms are γ
    rows = _kept(left.norm(dim=-1), row_bounds)
    columns = _kept(right.norm(dim=-2), column_bounds)

    row_weights, column_weights = _inverse(rows), _inverse(columns)
    if normalization == "row":
        column_weights = torch.ones_like(columns)
    elif normalization == "column":
        row_weights = torch.ones_like(rows)
    elif normalization == "equilibrated":
        row_weights, column_weights = _equilibrate(left, right_basis, rows, columns)

    core = _core(left * row_weights.unsqueeze(-1))
    other = _core(right_basis * column_weights.unsqueeze(-1))
    values = torch.linalg.svdvals(core @ other.mT)
    padded = torch.nn.functional.pad(values, (0, B.shape[-1] - values.shape[-1]))
    norm = torch.linalg.matrix_norm
    frobenius, factors = norm(left), norm(B) * norm(A)
    none = torch.zeros_like(frobenius)
    return Solution(padded, rows.mean(-1), columns.mean(-1), frobenius, factors, none)


def _core(tall: Tensor) -> Tensor:
    """The R of a thin QR. Shape: (k, m, r) -> (k, min(m, r), r)."""
    core: Tensor = torch.linalg.qr(tall, mode="r").R
    return core


def _kept(norms: Tensor, bounds: Tensor) -> Tensor:
    return torch.where(norms > ZERO_ROW * bounds, norms, 0.0)


def _inverse(norms: Tensor) -> Tensor:
    """Moore-Penrose inverse of a diagonal of norms: zero stays zero."""
    return torch.where(norms > 0, 1.0 / norms, 0.0)


def _equilibrate(
    left: Tensor, right_basis: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Alternate unit rows and unit columns of `left · right_basisᵀ`. Shape: (k, m), (k, n)."""
    column_weights = torch.ones_like(columns)
    for _ in range(EQUILIBRATION_SWEEPS):
        core = _core(right_basis * column_weights.unsqueeze(-1))
        row_weights = _inverse((left @ core.mT).norm(dim=-1)) * (rows > 0)
        core = _core(left * row_weights.unsqueeze(-1))
        column_weights = _inverse((right_basis @ core.mT).norm(dim=-1)) * (columns > 0)
    return row_weights, column_weights
