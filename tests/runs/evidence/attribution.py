"""Each module's part in the harm: integrated gradients of the log-odds of a refusal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.calibration.gates import GatedAdapter

POINTS = 6
"""Midpoints of the path from no adapter to the whole one."""


def harm_by_module(
    model: LanguageModel, adapter: GatedAdapter, refusals: Sequence[tuple[Encoded, Encoded]]
) -> Tensor:
    """`−∫ ∂/∂z log-odds of refusal dz` for each module, z from 0 to 1 for all; (modules,).

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks (2017), with the base
    model as the baseline.
    """
    total = torch.zeros(len(adapter.layers))
    for point in range(POINTS):
        scale = torch.full((len(adapter.layers),), (point + 0.5) / POINTS, requires_grad=True)
        adapter.set(
            [
                scale[i] * torch.eye(len(layer.S), device=layer.S.device)
                for i, layer in enumerate(adapter.layers)
            ]
        )
        found = model.answer_logits([(prompt, answer[:1]) for prompt, answer in refusals])
        likelihood = torch.log_softmax(found.logits, -1)[
            torch.arange(len(found.targets)), found.targets
        ]
        odds = likelihood - torch.log1p(-likelihood.exp().clamp(max=1 - 1e-6))
        odds.mean().backward()
        assert scale.grad is not None
        total -= scale.grad / POINTS
    return total


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
