"""How the log-odds of the base model's refusals depend on what its modules put out.

Gradients go back one layer at a time: each layer runs again on its kept inputs, so that one layer's
activations are in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.base_model.padded_batches import log_odds
from s3lora_serve.lab.statistics.input_statistics import add_gram
from s3lora_serve.lab.statistics.layer_pass import (
    ExampleBatch,
    Tokens,
    counted_rows,
    given_hidden,
    hidden_of,
    hooked,
)
from s3lora_serve.lab.tokens import ODDS_TOKENS


@dataclass(slots=True)
class OutputSums:
    """Sums over the counted tokens, for one module."""

    gradients: Tensor  # Σ g·gᵀ, (m, m) float64
    shift: Tensor  # Σ g·(Vᵀx)ᵀ, (m, k) float64, V of the module's inputs
    energy: float = 0.0  # Σ ‖y‖², of the module's own outputs
    count: int = 0
    routed: bool = False  # of an expert, which gets some tokens


Sums = dict[str, OutputSums]
"""By module."""


def gradients_at_the_end(model: LanguageModel, found: Sequence[ExampleBatch]) -> list[Tensor]:
    """The gradients of Σ log-odds with respect to what the last layer puts out.

    `found` are batches after the last layer.
    """
    gradients = []
    for batch in found:
        hidden = batch.hidden.to(model.device).detach().requires_grad_()
        logits, targets = given_hidden(model, batch, hidden, ODDS_TOKENS)
        [gradient] = torch.autograd.grad(log_odds(logits, targets).sum(), [hidden])
        gradients.append(gradient.cpu())
    return gradients


def back_through_layer(
    layer: Any,
    place: int,
    name: str,
    found: Sequence[ExampleBatch],
    inputs: Sequence[Tensor],
    gradients: list[Tensor],
    directions: Mapping[str, Tensor],
    device: torch.device,
) -> Sums:
    """Sums of one layer's modules; `gradients` become those with respect to its inputs.

    `directions` has the V of the inputs of each module, (n, k).
    """
    sums: Sums = {}
    V = {module: each.float().to(device) for module, each in directions.items()}
    for i, batch in enumerate(found):
        args, more = batch.calls[place]
        hidden = inputs[i].to(device).detach().requires_grad_()
        with _added(layer, name) as added:
            output = hidden_of(layer(hidden, *args, **more))
            wanted = [hidden, *(each.zero for each in added.values())]
            made = torch.autograd.grad(output, wanted, gradients[i].to(device), allow_unused=True)
        gradients[i] = made[0].cpu()
        for (module, each), gradient in zip(added.items(), made[1:], strict=True):
            if gradient is None and each.tokens is None:
                continue
            gradient = torch.zeros_like(each.zero) if gradient is None else gradient
            _add(sums, module, each, gradient, batch, V[module])
    _settle_experts(sums)
    return sums


@dataclass(frozen=True, slots=True)
class _Added:
    """What was added to a module's output, its input and output, and which tokens they are of."""

    zero: Tensor
    inputs: Tensor
    output: Tensor
    tokens: Tokens


def _add(
    sums: Sums, module: str, each: _Added, gradient: Tensor, batch: ExampleBatch, V: Tensor
) -> None:
    rows = counted_rows(batch, gradient, each.tokens)
    if module not in sums:
        m, device = rows.shape[1], rows.device
        squares, shift = (
            torch.zeros(m, width, dtype=torch.float64, device=device) for width in (m, V.shape[1])
        )
        sums[module] = OutputSums(squares, shift, routed=each.tokens is not None)
    outputs = counted_rows(batch, each.output, each.tokens)
    inputs = counted_rows(batch, each.inputs, each.tokens)
    add_gram(sums[module].gradients, rows)
    sums[module].shift += rows.float().mT @ (inputs.float() @ V)
    sums[module].energy += float(outputs.double().square().sum())
    sums[module].count += len(rows)


def _settle_experts(sums: Sums) -> None:
    """Give each routed expert one token more, as `Covariances.settle_experts` does for inputs."""
    alike: dict[str, list[OutputSums]] = {}
    for module, each in sums.items():
        if each.routed:
            alike.setdefault(module.rpartition(".")[2], []).append(each)
    for those in alike.values():
        count = max(1, sum(each.count for each in those))
        gradient = sum(float(each.gradients.trace()) for each in those) / count
        energy = sum(each.energy for each in those) / count
        for each in those:
            each.gradients.diagonal().add_(gradient / len(each.gradients))
            each.energy += energy
            each.count += 1


@contextmanager
def _added(layer: Any, name: str) -> Iterator[dict[str, _Added]]:
    """Within this context each linear module of the layer adds a zero that has a gradient."""
    added: dict[str, _Added] = {}

    def adding(module: Any, module_name: str) -> Any:
        def add(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            own, tokens = inputs[0].detach(), getattr(module, "tokens", None)
            if getattr(module, "takes_all", False):
                own = own[tokens]
            added[module_name] = _Added(zero, own, output.detach(), tokens)
            return output + zero

        return module.register_forward_hook(add)

    with hooked(layer, name, adding):
        yield added
