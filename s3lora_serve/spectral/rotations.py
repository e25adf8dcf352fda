"""Random orientations of an update, drawn without the large matrices that have them."""

import torch
from torch import Tensor

ROTATIONS = 50
"""Random orientations of an update. Source: SPLoRA's code, number of sample pairs."""


def frame_blocks(m: int, k: int, r: int) -> Tensor:
    """Blocks of k rows of uniformly distributed orthonormal frames (m, r), from a fixed seed.

    A frame is a Gaussian matrix times the inverse root of its Gram matrix. The other m − k rows
    enter only by their Gram matrix, which Bartlett's decomposition of Wishart's distribution draws.

    Shape: -> (ROTATIONS, k, r) float64. m ≥ max(k, r).
    """
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(ROTATIONS, k, r, generator=draw, dtype=torch.float64)
    below = torch.randn(ROTATIONS, r, r, generator=draw, dtype=torch.float64)
    rest = max(0, m - k)
    if rest > r:
        shape = (rest - torch.arange(r, dtype=torch.float64)) / 2
        squares = 2 * _gamma(shape.expand(ROTATIONS, r), draw)
        below = below.tril(-1) + torch.diag_embed(squares.sqrt())
        others = below @ below.mT
    else:
        others = below[:, :rest].mT @ below[:, :rest]
    values, vectors = torch.linalg.eigh(block.mT @ block + others)
    inverse_root = vectors / values.clamp_min(1e-300).sqrt().unsqueeze(-2) @ vectors.mT
    blocks: Tensor = block @ inverse_root
    return blocks


def _gamma(shape: Tensor, draw: torch.Generator) -> Tensor:
    """Gamma variates of shapes ≥ 1 from a generator of its own, by rejection.

    torch.distributions knows only the process's generator, whose state is the engine's.
    Source: Marsaglia and Tsang, ACM TOMS 26 (2000).
    """
    d = shape - 1 / 3
    found = torch.full_like(d, torch.nan)
    while (todo := found.isnan()).any():
        x = torch.randn(d.shape, generator=draw, dtype=d.dtype)
        v = (1 + x / (9 * d).sqrt()) ** 3
        accepted = torch.rand(d.shape, generator=draw, dtype=d.dtype).log() < (
            0.5 * x**2 + d - d * v + d * v.clamp_min(1e-300).log()
        )
        found = torch.where(todo & accepted & (v > 0), d * v, found)
    return found
