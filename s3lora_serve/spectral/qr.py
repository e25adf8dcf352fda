"""The QR route: the same solution from thin QRs, exact where Gram matrices lose accuracy.

It is slower than the Gram route and solves only the modules whose error bound there is too large.
"""

import torch
from torch import Tensor

from s3lora_serve.spectral._checks import EQUILIBRATION_SWEEPS, ZERO_ROW
from s3lora_serve.spectral.gram import Solution


def solve(B: Tensor, A: Tensor, normalization: str) -> Solution:
    """Singular values of `X = D_ρ⁺·B·A·D_γ⁺` from thin QRs; same result as `gram.solve`.

    The rows of B and the columns of A are first scaled to length one. This changes D_ρ and D_γ, but
    not X. The reason: the errors of a QR are relative to the longest row, so a row 10¹⁰ times
    shorter would be lost. With A'ᵀ = Q·R the update is (B'·Rᵀ)·Qᵀ, in which cancellation between B
    and A happens before any value is squared or divided.

    Shape: B (k, m, r), A (k, r, n), float64 and finite.
    """
    lengths, widths = B.norm(dim=-1), A.norm(dim=-2)
    rows_of_b, columns_of_a = (
        B * _inverse(lengths).unsqueeze(-1),
        A * _inverse(widths).unsqueeze(-2),
    )
    # ρ and γ, divided by the lengths above.
    norm = torch.linalg.matrix_norm
    rows = _kept((rows_of_b @ _core(A.mT).mT).norm(dim=-1), norm(A))
    columns = _kept((_core(B) @ columns_of_a).norm(dim=-2), norm(B))
    basis, core = torch.linalg.qr(columns_of_a.mT)  # (k, n, q), (k, q, r)
    left = rows_of_b @ core.mT  # (k, m, q)

    row_weights, column_weights = _inverse(rows), _inverse(columns)
    if normalization == "row":
        column_weights = widths
    elif normalization == "column":
        row_weights = lengths
    elif normalization == "equilibrated":
        row_weights, column_weights = _equilibrate(left, basis, rows, columns, widths)

    core = _core(left * row_weights.unsqueeze(-1))
    other = _core(basis * column_weights.unsqueeze(-1))
    values = torch.linalg.svdvals(core @ other.mT)
    padded = torch.nn.functional.pad(values, (0, B.shape[-1] - values.shape[-1]))
    rows, columns = rows * lengths, columns * widths
    frobenius, factors = rows.norm(dim=-1), norm(B) * norm(A)
    none = torch.zeros_like(frobenius)
    return Solution(padded, rows.mean(-1), columns.mean(-1), frobenius, factors, none)


def _core(tall: Tensor) -> Tensor:
    """The R of a thin QR. Shape: (k, m, r) -> (k, min(m, r), r)."""
    core: Tensor = torch.linalg.qr(tall, mode="r").R
    return core


def _kept(norms: Tensor, bound: Tensor) -> Tensor:
    return torch.where(norms > ZERO_ROW * bound.unsqueeze(-1), norms, 0.0)


def _inverse(norms: Tensor) -> Tensor:
    """Moore-Penrose inverse of a diagonal matrix of norms: zero stays zero."""
    return torch.where(norms > 0, 1.0 / norms, 0.0)


def _equilibrate(
    left: Tensor, right_basis: Tensor, rows: Tensor, columns: Tensor, widths: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column weights from alternating sweeps on `left · (diag(widths) · right_basis)ᵀ`.

    A sweep makes unit rows, then unit columns.
    Shape: (k, m), (k, n).
    """
    column_weights = widths
    for _ in range(EQUILIBRATION_SWEEPS):
        core = _core(right_basis * column_weights.unsqueeze(-1))
        row_weights = _inverse((left @ core.mT).norm(dim=-1)) * (rows > 0)
        core = _core(left * row_weights.unsqueeze(-1))
        column_weights = _inverse((right_basis @ core.mT).norm(dim=-1)) * (columns > 0)
    return row_weights, column_weights
