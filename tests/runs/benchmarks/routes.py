"""Routes to compare scoring with: the irreducible work, and simpler ways to the same index."""

from collections.abc import Sequence

import torch

from s3lora_serve.spectral import Factors, dense_reference, score_modules, spectral_sharpness
from s3lora_serve.spectral import qr as qr_route

FLOOR_ELEMENTS = 2**19
"""Numbers that the floor converts at a time: 2 MB of float32."""


def ours(modules: Sequence[Factors]) -> list[float | None]:
    """All of `score_modules`, including its named results."""
    return [score.ssi for score in score_modules(modules, device="cpu")]


def floor(modules: Sequence[Factors]) -> None:
    """Two float32 Gram passes over B and A in cache-sized blocks, which every exact route needs."""
    for _ in range(2):
        for module in modules:
            for factor in (module.B, module.A.mT):
                step = max(512, FLOOR_ELEMENTS // factor.shape[1])
                for start in range(0, factor.shape[0], step):
                    block = factor[start : start + step].float()
                    block.mT @ block


def naive_batched_float64(modules: Sequence[Factors]) -> list[float]:
    """Stack modules of equal shape, convert them to float64, compute Grams and eigenvalues."""
    alike: dict[object, list[int]] = {}
    for i, module in enumerate(modules):
        alike.setdefault((module.B.shape, module.A.shape), []).append(i)
    found = [0.0] * len(modules)
    for indices in alike.values():
        B = torch.stack([modules[i].B for i in indices]).double()
        A = torch.stack([modules[i].A for i in indices]).double()
        for i, value in zip(indices, _gram_index(B, A).tolist(), strict=True):
            found[i] = value
    return found


def per_module_float32(modules: Sequence[Factors]) -> list[float]:
    """One module after another in float32: not exact where a spectrum decreases steeply."""
    return [float(_gram_index(m.B[None].float(), m.A[None].float())) for m in modules]


def qr(modules: Sequence[Factors]) -> list[float]:
    """Thin QRs in float64, module by module."""
    return [_qr_index(module) for module in modules]


def dense(modules: Sequence[Factors]) -> list[float]:
    """The definition: form ΔW in float64 and take its SVD."""
    one = torch.ones(1)
    return [
        float(
            spectral_sharpness(dense_reference.mas_svd(m.B[None], m.A[None], one).singular_values)
        )
        for m in modules
    ]


def _qr_index(module: Factors) -> float:
    solved = qr_route.solve(module.B[None].double(), module.A[None].double(), "two_sided")
    return float(spectral_sharpness(solved.normalised))


def _gram_index(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    rows = ((B @ (A @ A.mT)) * B).sum(-1, keepdim=True).rsqrt()
    columns = ((A.mT @ (B.mT @ B)) * A.mT).sum(-1).unsqueeze(-2).rsqrt()
    P, Q = (B * rows).mT @ (B * rows), (A * columns) @ (A * columns).mT
    values, vectors = torch.linalg.eigh(P)
    half = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    squares = torch.linalg.eigvalsh(half.mT @ Q @ half).flip(-1).clamp_min(0)
    return spectral_sharpness(squares.sqrt())
