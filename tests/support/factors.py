"""Batches of LoRA factors that are hard to score, each named after the difficulty."""

from collections.abc import Callable

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # B (k, m, r), A (k, r, n)


def gaussian(m: int, n: int, r: int, k: int = 2, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed + 7 * m + 5 * n + 3 * r)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(k, m, r), draw(k, r, n)


def _six_decades_in_a() -> Factors:
    B, A = gaussian(96, 80, 16)
    return B, A * torch.logspace(0, -6, 16, dtype=torch.float64)[:, None]


def _six_decades_in_the_update() -> Factors:
    B, A = gaussian(96, 80, 16)
    B, A = torch.linalg.qr(B)[0], torch.linalg.qr(A.mT)[0].mT
    return B * torch.logspace(0, -6, 16, dtype=torch.float64), A


def _repeated_values() -> Factors:
    B, A = gaussian(96, 80, 16)
    return torch.linalg.qr(B)[0], torch.linalg.qr(A.mT)[0].mT


def _zero_rows_and_columns() -> Factors:
    B, A = gaussian(96, 80, 8)
    B[:, [0, 40, 95]], A[:, :, [3, 79]] = 0, 0
    return B, A


def _outlier_row() -> Factors:
    B, A = gaussian(96, 80, 16)
    B[:, 5] *= 1e4
    return B, A


def _rows_that_cancel() -> Factors:
    B, A = gaussian(96, 80, 16)
    A[:, 1] = A[:, 0]
    B[:, :9] = 0
    B[:, :9, 0], B[:, :9, 1] = 1, -1
    return B, A


def _columns_that_cancel() -> Factors:
    B, A = _rows_that_cancel()
    return A.mT.contiguous(), B.mT.contiguous()


def _rank_one_in_dense_factors() -> Factors:
    B, A = gaussian(96, 80, 16)
    return B, A[:, :, :1] * A[:, :1, :]


def _rank_one_with_an_inner_basis_that_cancels() -> Factors:
    # B·A = u·vᵀ, both factors dense and of full rank: B = [u, 0] + …, mixed by an orthogonal basis.
    B, A = gaussian(96, 80, 16)
    B[:, :, 1:], A[:, 8:] = 0, 0
    basis = torch.linalg.qr(gaussian(16, 16, 16)[0])[0]
    return B @ basis, basis.mT @ A


def _zero_update() -> Factors:
    B, A = gaussian(96, 80, 8)
    return torch.zeros_like(B), A


HARD: dict[str, Callable[[], Factors]] = {
    "well conditioned": lambda: gaussian(96, 80, 16),
    "six decades in A": _six_decades_in_a,
    "six decades in the update": _six_decades_in_the_update,
    "repeated values": _repeated_values,
    "zero rows and columns": _zero_rows_and_columns,
    "outlier row": _outlier_row,
    "rows that cancel": _rows_that_cancel,
    "columns that cancel": _columns_that_cancel,
    "rank one in dense factors": _rank_one_in_dense_factors,
    "rank one, inner basis cancels": _rank_one_with_an_inner_basis_that_cancels,
    "zero update": _zero_update,
    "rank 1": lambda: gaussian(96, 80, 1),
    "rank 256": lambda: gaussian(300, 280, 256, k=1),
    "r larger than m": lambda: gaussian(5, 80, 16),
    "r larger than n": lambda: gaussian(96, 7, 16),
    "r larger than both": lambda: gaussian(5, 7, 16),
    "odd shapes": lambda: gaussian(123, 5, 3),
    "one by one": lambda: gaussian(1, 1, 1),
    "non-contiguous": lambda: tuple(x.mT.contiguous().mT for x in gaussian(96, 80, 16)),  # type: ignore[dict-item]
    "no modules": lambda: gaussian(96, 80, 4, k=0),
}
