"""Covariances of the inputs of a base model's linear modules, and the statistics made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import Encoded
from s3lora_serve.lab.statistics.layer_pass import ExampleBatch, Tokens, counted_rows, run_layer
from s3lora_serve.spectral.input_directions import InputDirections, input_directions

HARMFUL = "harmful"

Examples = Mapping[str, Sequence[tuple[Encoded, Encoded]]]
"""Prompts with the base model's answers: harmful ones, and those of each file of benign ones."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How statistics are made."""

    rank: int = 64
    output_rank: int = 64
    epsilon: float = 0.1
    dtype: torch.dtype = torch.bfloat16


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add Σ x·xᵀ of the rows of one batch, multiplied in float32, to a float64 total."""
    rows = rows.float()
    total += rows.mT @ rows


class Covariances:
    """Sums of x·xᵀ over the counted tokens of each kind, for the sites of one layer."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = tuple(kinds)
        self._routed: set[tuple[str, ...]] = set()  # sites of experts, which get some tokens
        self.sums: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.counts: dict[tuple[str, ...], dict[str, int]] = {}

    def add(
        self, modules: tuple[str, ...], inputs: Tensor, batch: ExampleBatch, tokens: Tokens = None
    ) -> None:
        """Add the counted tokens of one input, (examples, tokens, n) or (tokens, n).

        Raises:
            BaseModelUnfit: the modules get some of the tokens, and are no routed experts.
        """
        n = inputs.shape[-1]
        rows = counted_rows(batch, inputs, tokens)
        if tokens is not None:
            self._routed.add(modules)
        sums = self.sums.setdefault(
            modules,
            {k: torch.zeros(n, n, dtype=torch.float64, device=rows.device) for k in self._kinds},
        )
        add_gram(sums[batch.kind], rows)
        self.counts.setdefault(modules, dict.fromkeys(self._kinds, 0))[batch.kind] += len(rows)

    def settle_experts(self) -> None:
        """Give each routed expert one token more: one of their mean energy, in no direction.

        An expert that no probe reaches then has statistics that prefer nothing, and one that few
        reach does not take what it has seen for all that there is.
        """
        for kind in self._kinds:
            total = sum(float(self.sums[site][kind].trace()) for site in self._routed)
            count = sum(self.counts[site][kind] for site in self._routed)
            for site in self._routed:
                covariance = self.sums[site][kind]
                covariance.diagonal().add_(total / max(1, count) / len(covariance))
                self.counts[site][kind] += 1

    def statistics(
        self, modules: tuple[str, ...], weights: Mapping[str, float], choice: Choice
    ) -> InputDirections:
        """Statistics of one site: `C_h`, and `C_b` as the weighted mean over benign kinds.

        Raises:
            ValueError: the inputs of a kind are all zero or not finite.
        """
        means = {
            kind: total / max(1, self.counts[modules][kind])
            for kind, total in self.sums[modules].items()
        }
        C_h = means.pop(HARMFUL)
        total = sum(weights[kind] for kind in means)
        C_b = sum((weights[kind] / total * mean for kind, mean in means.items()), 0 * C_h)
        return input_directions(
            C_h, C_b, rank=choice.rank, epsilon=choice.epsilon, dtype=choice.dtype
        )


def collect(
    layer: Any, place: int, name: str, found: Sequence[ExampleBatch], device: torch.device
) -> Covariances:
    """Run one layer on the batches; the covariances of its modules' inputs."""
    sums = Covariances(tuple(dict.fromkeys(batch.kind for batch in found)))
    run_layer(layer, place, name, found, sums.add, device)
    sums.settle_experts()
    return sums
