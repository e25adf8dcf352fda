"""Families of gates M for the modules of an adapter, and what is learnt of each.

- `directions`: `M = R·(T ∘ 1/(1 + c·exp(θ)))·Zᵀ` with θ of k x k: pairs of an output's and an
  input's direction, attenuated (`directions.py`). θ starts at `log(γ_i·e_j/λ)`, the closed form;
- `subspace`: `M = (I + c·X·Xᵀ)⁻¹` with X of k x k: directions of the column space, attenuated;
- `component`: `M = diag(z)`, z of 0 or 1: singular components, removed or kept;
- `module`: `M = z·I`, z of 0 or 1: the module, removed or kept.

The strength c moves all gates of a search together: c = 0 keeps the adapter whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.calibration.directions import Directions, Example, directions
from s3lora_serve.lab.calibration.gates import GatedAdapter

By = Literal["directions", "subspace", "component", "module"]

RATE: dict[By, float] = {"directions": 0.7, "subspace": 0.05, "component": 0.15, "module": 0.15}
"""Adam's first step size, which falls to a tenth. Ours, from the bench's adapters."""

START = {"directions": 1.0, "subspace": 0.3, "component": 1.0, "module": 1.0}
"""λ = 1: a pair of mean harm is halved. X = 0.3·I gives M = 0.92·I: nearly the whole adapter, yet
with a gradient. Ours."""

SMALLEST_HARM = 1e-12
"""Of γ_i·e_j, relative to the mean: log of it is finite, and it is never attenuated."""


class Gates:
    """The learnable gates of one adapter, of one family; those of one rank are computed at once."""

    def __init__(self, start: Sequence[Tensor]) -> None:
        """`start` has the first parameters of each module, in the adapter's order."""
        self._groups: dict[int, list[int]] = {}
        for place, each in enumerate(start):
            self._groups.setdefault(len(each), []).append(place)
        self.parameters = {
            rank: torch.stack([start[place] for place in places]).requires_grad_()
            for rank, places in self._groups.items()
        }

    def matrices(self, strength: float = 1.0) -> list[Tensor]:
        """M of every module, in the adapter's order, (k, k)."""
        found: dict[int, Tensor] = {}
        for rank, places in self._groups.items():
            stacked = self._stacked(rank, self.parameters[rank], strength)
            found |= zip(places, stacked, strict=True)
        return [found[place] for place in range(len(found))]

    def state(self) -> dict[str, Tensor]:
        """A copy of the parameters, by rank."""
        return {str(rank): value.detach().clone() for rank, value in self.parameters.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the parameters to what `state` returned."""
        with torch.no_grad():
            for rank, value in self.parameters.items():
                value.copy_(state[str(rank)])

    def _stacked(self, rank: int, parameter: Tensor, strength: float) -> Tensor:
        """M of all modules of one rank, (modules, rank, rank)."""
        raise NotImplementedError


class DirectionGates(Gates):
    """Gates that attenuate pairs of directions; they start as the closed form."""

    def __init__(
        self, found: Sequence[Directions], sizes: Sequence[Tensor], device: torch.device
    ) -> None:
        """`sizes` are the singular values of each module's update."""
        harm = [each.harm.clamp_min(SMALLEST_HARM).log().float() for each in found]
        super().__init__([(each - math.log(START["directions"])).to(device) for each in harm])
        self._fixed = {
            rank: tuple(
                torch.stack([part[place] for place in places]).float().to(device)
                for part in (
                    [each.R for each in found],
                    [each.whole for each in found],
                    [each.Z.mT for each in found],
                    sizes,
                )
            )
            for rank, places in self._groups.items()
        }

    def _stacked(self, rank: int, parameter: Tensor, strength: float) -> Tensor:
        R, whole, Zt, sizes = self._fixed[rank]
        gates = R @ (whole / (1 + strength * parameter.exp())) @ Zt
        # Z is not orthogonal: what is attenuated there may be larger as a matrix.
        sized = gates * sizes[:, None]
        growth = sized.norm(dim=(1, 2)) / sizes.norm(dim=1).clamp_min(1e-30)
        found: Tensor = gates / growth.clamp_min(1.0)[:, None, None]
        return found


class SubspaceGates(Gates):
    """Gates that attenuate directions of the column space."""

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        """Start near the whole adapter."""
        generator = torch.Generator().manual_seed(0)
        super().__init__(
            [
                (
                    START["subspace"] * torch.eye(k) + 0.02 * torch.randn(k, k, generator=generator)
                ).to(device)
                for k in ranks
            ]
        )

    def _stacked(self, rank: int, parameter: Tensor, strength: float) -> Tensor:
        identity = torch.eye(rank, device=parameter.device)
        attenuated: Tensor = torch.linalg.inv(identity + strength * parameter @ parameter.mT)
        return attenuated


class OpenOrShutGates(Gates):
    """Gates of 0 or 1, of components or of whole modules."""

    def __init__(self, by: By, ranks: Sequence[int], device: torch.device) -> None:
        """Start with all open; a module's gate has the components' shape and one value."""
        self._by_module = by == "module"
        super().__init__([torch.full((k,), START[by], device=device) for k in ranks])

    def _stacked(self, rank: int, parameter: Tensor, strength: float) -> Tensor:
        # Straight-through: 0 or 1 forward, the sigmoid's slope backward. The threshold rises with
        # the strength: at 1 it is 0, at 0 every gate is open.
        if self._by_module:
            parameter = parameter.mean(1, keepdim=True).expand(-1, rank)
        soft = torch.sigmoid(parameter)
        threshold = -math.inf if strength == 0 else math.log(strength)
        hard = (parameter > threshold).float()
        return torch.diag_embed(soft + (hard - soft).detach())


def first_gates(
    by: By,
    model: LanguageModel,
    adapter: GatedAdapter,
    refusals: Sequence[Example],
    kept: Sequence[Sequence[Example]],
    done: Callable[[int], None] = lambda _: None,
) -> Gates:
    """Gates of a family as they are before the first step; for `directions` see there."""
    sizes = [layer.S for layer in adapter.layers]
    if by == "directions":
        found = directions(model, adapter, refusals, kept, done)
        return DirectionGates(found, sizes, model.device)
    ranks = [len(each) for each in sizes]
    if by == "subspace":
        return SubspaceGates(ranks, model.device)
    return OpenOrShutGates(by, ranks, model.device)
