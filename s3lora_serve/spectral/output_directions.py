"""What repair needs of the gradients of refusals at a module's outputs: leading directions."""

from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.base_statistics import OutputStatistics
from s3lora_serve.spectral.leading_subspace import leading


class OutputDirections(NamedTuple):
    """Statistics of one module's outputs, and what share of tr(G) their directions hold."""

    statistics: OutputStatistics
    captured: float


def output_directions(G: Tensor, *, rank: int, dtype: torch.dtype) -> OutputDirections:
    """The leading eigenvectors Q of `G = E[g·gᵀ]`, scaled so that its mean eigenvalue is 1.

    Shape: G (m, m) float64, symmetric -> Q (m, q) in `dtype`, gamma (q,) float64.

    Raises:
        ValueError: G is zero or not finite.
    """
    m = len(G)
    if not G.isfinite().all() or not float(G.trace()) > 0:
        raise ValueError("the gradients of refusals are all zero or not finite")
    G = G * (m / float(G.trace()))
    Q, gamma = leading(G, rank)
    rest = max(0.0, m - float(gamma.sum())) / max(1, m - len(gamma))
    Q = Q.to(dtype).cpu()
    inverse = torch.linalg.inv(Q.double().mT @ Q.double())
    statistics = OutputStatistics(Q=Q, gamma=gamma.cpu(), gamma_rest=rest, inverse=inverse)
    return OutputDirections(statistics, min(1.0, float(gamma.sum()) / m))
