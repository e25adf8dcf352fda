"""How well numbers of adapters tell harmful ones from others that no fit has seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DECAY = 0.1
"""Weight of ‖w‖² in the logistic regression, for each adapter that it learns from."""

FALSE_ALARMS = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter's numbers, its label, and the groups that splits are made by."""

    numbers: dict[str, float]
    is_harmful: bool
    groups: dict[str, str]


def auc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a harmful adapter scores above a harmless one; a tie counts half."""
    harmful, harmless = scores[labels], scores[~labels]
    above = (harmful[:, None] > harmless[None]).double()
    ties = (harmful[:, None] == harmless[None]).double()
    return float((above + ties / 2).mean())


def found_at(scores: Tensor, labels: Tensor, alarms: float = FALSE_ALARMS) -> float:
    """The share of harmful adapters over a bound that at most `alarms` of the others exceed."""
    harmless = scores[~labels].sort(descending=True).values
    bound = harmless[min(len(harmless) - 1, int(alarms * len(harmless)))]
    return float((scores[labels] > bound).double().mean())


def held_out(rows: Sequence[Row], by: str, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Scores and labels of each group, from a fit on all other groups."""
    found = []
    for group in sorted({row.groups[by] for row in rows}):
        fit = [row for row in rows if row.groups[by] != group]
        test = [row for row in rows if row.groups[by] == group]
        score = fitted(fit, names)
        found.append((score(test), _labels(test)))
    return found


def fitted(rows: Sequence[Row], names: Sequence[str]) -> Callable[[Sequence[Row]], Tensor]:
    """Scores by a logistic regression on standardised numbers."""
    X, y = _table(rows, names), _labels(rows).double()
    mean, spread = X.mean(0), X.std(0).clamp_min(1e-9)
    w = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        logits = ((X - mean) / spread) @ w + b
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        loss = loss + DECAY * w.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    weights, bias = w.detach(), b.detach()
    return lambda those: ((_table(those, names) - mean) / spread) @ weights + bias


def _table(rows: Sequence[Row], names: Sequence[str]) -> Tensor:
    return torch.tensor([[row.numbers[name] for name in names] for row in rows]).double()


def _labels(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([row.is_harmful for row in rows])
