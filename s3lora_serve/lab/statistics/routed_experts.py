"""Routed experts, whose weights transformers keeps in one tensor for each layer and side.

Adapters have a module for each projection of each expert, by the names of the checkpoint. Where the
checkpoint too has all experts in one tensor, gate and up are one projection, named as
`adapter/stacked_experts.py` does. The experts run here one by one through objects with these names,
which take hooks as linear modules do.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.adapter.stacked_experts import PARAMETERS, StackedPair

SIDES = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
"""How checkpoints name an expert's gate, up and down projections."""

IMPLEMENTATION = "s3lora"
"""The name of `run_one_by_one` among transformers' ways to run experts."""


class ExpertProjection(torch.nn.Module):
    """One projection of one expert; its weight is a slice of the layer's tensor.

    `tokens` are the places of the tokens that the expert gets in the call that runs. Gate and up
    take the inputs of all tokens of the layer, which are one input site.
    """

    def __init__(self, name: str, *, takes_all: bool) -> None:
        super().__init__()
        self.name = name
        self.takes_all = takes_all
        self.tokens: Tensor

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`W·x` of the expert's own tokens: (tokens, n) or (own tokens, n) -> (own tokens, m)."""
        own = x[self.tokens] if self.takes_all else x
        return torch.nn.functional.linear(own, weight, bias)


def name_experts(model: Any, names: Iterable[str]) -> None:
    """Give the experts of a model the names of a checkpoint's linear modules, and run them so.

    Experts without gates are left as they are.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_one_by_one)
    by_layer: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(r"(.+\.\d+)\.[^\d]+\.experts\.\d+\.\w+", name):
            by_layer.setdefault(found[1], []).append(name)
    for path, module in model.named_modules():
        if _is_gated(module):
            layer = re.sub(r"(\.\d+)\.[^\d]+$", r"\1", path)
            named = _named(by_layer.get(layer, []), module) or _stacked(path, module)
            module.projections = torch.nn.ModuleList(named)
            module.config._experts_implementation = IMPLEMENTATION


def _is_gated(module: Any) -> bool:
    """Whether it holds experts with gates, each side in one tensor of three dimensions."""
    sides = (getattr(module, side, None) for side in PARAMETERS)
    return getattr(module, "has_gate", False) and all(
        isinstance(side, torch.nn.Parameter) and side.ndim == 3 for side in sides
    )


def _stacked(path: str, module: Any) -> list[torch.nn.ModuleList]:
    """Two projections of each expert, for a checkpoint with all experts in one tensor."""
    both, down = (StackedPair(path, parameter) for parameter in PARAMETERS)
    return [
        torch.nn.ModuleList(
            (
                ExpertProjection(both.module(e), takes_all=True),
                ExpertProjection(down.module(e), takes_all=False),
            )
        )
        for e in range(len(module.down_proj))
    ]


def _named(names: list[str], module: Any) -> list[torch.nn.ModuleList]:
    """Three projections of each expert; none if the checkpoint does not have all of them."""
    if module.is_transposed or module.has_bias or not module.is_concatenated:
        return []
    have, experts = set(names), len(module.down_proj)
    parents = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
    for parent in parents:
        for sides in SIDES:
            wanted = [[f"{parent}.{e}.{side}" for side in sides] for e in range(experts)]
            if have.issuperset(name for each in wanted for name in each):
                return [_projections(*each) for each in wanted]
    return []


def _projections(gate: str, up: str, down: str) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(
        (
            ExpertProjection(gate, takes_all=True),
            ExpertProjection(up, takes_all=True),
            ExpertProjection(down, takes_all=False),
        )
    )


def run_one_by_one(
    experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the layer's experts put out together, (tokens, n). Those without tokens run too."""
    total = torch.zeros_like(hidden)
    for place, projections in enumerate(experts.projections):
        tokens, rank = torch.where(top_k_index == place)
        for each in projections:
            each.tokens = tokens
        *inner, down = projections
        W, bias = _weights(experts, "gate_up_proj", place)
        if len(inner) == 1:
            both = inner[0](hidden, W, bias)
        else:
            both = torch.cat(
                [p(hidden, part) for p, part in zip(inner, W.chunk(2), strict=True)], -1
            )
        own = down(experts._apply_gate(both), *_weights(experts, "down_proj", place))
        own = own * top_k_weights[tokens, rank, None]
        total = total.index_add(0, tokens, own.to(total.dtype))
    return total


def _weights(experts: Any, side: str, place: int) -> tuple[Tensor, Tensor | None]:
    """One expert's weight, (m, n), and its bias."""
    weight = getattr(experts, side)[place]
    bias = getattr(experts, f"{side}_bias")[place] if experts.has_bias else None
    return weight.mT if experts.is_transposed else weight, bias
