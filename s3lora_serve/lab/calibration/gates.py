"""Gates on the components of an adapter: `ΔW' = U·M·Uᵀ·ΔW` with `0 ≼ M ≼ I` for each module.

`ΔW = U·S·Vᵀ` is the thin SVD, from the factors. M acts on the column space of ΔW, so for every
input the update's output is at most as long as before, and nothing is added. Three families:

- `subspace`: `M = (I + c·X·Xᵀ)⁻¹` with X of r x r: directions of the column space, attenuated;
- `component`: `M = diag(z)`, z of 0 or 1: singular components, removed or kept;
- `module`: `M = z·I`, z of 0 or 1: the module, removed or kept.

The strength c moves all gates of a search together: c = 0 keeps the adapter whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.errors import DoesNotFitModel, NotFinite

By = Literal["subspace", "component", "module"]

START = {"subspace": 0.3, "component": 1.0, "module": 1.0}
"""X = 0.3·I gives M = 0.92·I: nearly the whole adapter, yet with a gradient. Ours."""


class GatedLinear(nn.Module):
    """A frozen linear layer with the gated update of one LoRA module."""

    def __init__(self, linear: nn.Module, module: Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        U, S, V = thin_svd(module)
        self.U: Tensor
        self.S: Tensor
        self.V: Tensor
        # Not persistent: they are the adapter's, not the model's.
        self.register_buffer("U", U.to(dtype), persistent=False)
        self.register_buffer("S", (S * module.scaling).float(), persistent=False)
        self.register_buffer("V", V.to(dtype), persistent=False)
        self.gate: Tensor | None = None  # M, (k, k); None: the update as it is
        self.is_removed = False  # the layer is the base model's alone, whatever the update holds

    def forward(self, x: Tensor) -> Tensor:
        """`W·x + U·M·S·Vᵀ·x`."""
        if self.is_removed:
            return self.linear(x)  # type: ignore[no-any-return]
        inner = (x @ self.V) * self.S.to(x.dtype)
        if self.gate is not None:
            inner = inner @ self.gate.to(x.dtype).T
        output: Tensor = self.linear(x) + inner @ self.U.T
        return output


@dataclass(frozen=True, slots=True)
class GatedAdapter:
    """The gated layers of one adapter in a model, in the order of the adapter's modules."""

    modules: tuple[Module, ...]
    layers: tuple[GatedLinear, ...]
    places: tuple[tuple[Any, str], ...]  # of each layer: the module that holds it, and its name

    def detach(self) -> None:
        """Put the model's own layers back."""
        for layer, (parent, name) in zip(self.layers, self.places, strict=True):
            setattr(parent, name, layer.linear)

    def set(self, gates: Sequence[Tensor | None]) -> None:
        """Set M of every module."""
        for layer, gate in zip(self.layers, gates, strict=True):
            layer.gate, layer.is_removed = gate, False

    def keep(self) -> None:
        """Serve the adapter as it is."""
        self.set([None] * len(self.layers))

    def remove(self) -> None:
        """Serve the base model alone."""
        for layer in self.layers:
            layer.is_removed = True

    def removed_shares(self, gates: Sequence[Tensor]) -> Tensor:
        """`1 − ‖M·S‖_F² / ‖S‖_F²` for each module, float32."""
        shares = [
            1 - ((gate * s) ** 2).sum() / (s**2).sum().clamp(min=1e-30)
            for gate, s in zip(gates, self._spectra(), strict=True)
        ]
        return torch.stack(shares)

    def removed_share(self, gates: Sequence[Tensor]) -> Tensor:
        """The removed share of Σ‖ΔW‖_F² over all modules, float32."""
        energy = torch.stack([(s**2).sum() for s in self._spectra()])
        return (self.removed_shares(gates) * energy).sum() / energy.sum().clamp(min=1e-30)

    def _spectra(self) -> list[Tensor]:
        return [layer.S for layer in self.layers]


def attach(model: Any, adapter: Adapter) -> GatedAdapter:
    """Put an adapter's gated layers into a model, in the place of the layers that they update.

    Raises:
        DoesNotFitModel: the model has no such linear layer, or it has another shape.
        NotFinite: an update is too large for the model's layers.
    """
    places = [_place(model, module) for module in adapter.modules]
    layers = []
    for module, (parent, leaf) in zip(adapter.modules, places, strict=True):
        linear = getattr(parent, leaf)
        layers.append(GatedLinear(linear, module, linear.weight.dtype).to(linear.weight.device))
        if not layers[-1].S.isfinite().all():
            raise NotFinite(f"module {module.name} has singular values that float32 cannot hold")
    for layer, (parent, leaf) in zip(layers, places, strict=True):
        setattr(parent, leaf, layer)
    return GatedAdapter(adapter.modules, tuple(layers), tuple(places))


def _place(model: Any, module: Module) -> tuple[Any, str]:
    """The module that holds the linear layer which an adapter's module updates, and its name."""
    parent_name, _, leaf = module.name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, leaf)
    except AttributeError:
        raise DoesNotFitModel(f"the base model has no module {module.name}") from None
    weight = getattr(linear, "weight", None)
    if weight is None or tuple(weight.shape) != module.shape:
        found = tuple(weight.shape) if weight is not None else "no weight"
        raise DoesNotFitModel(
            f"module {module.name} updates a {module.shape[0]} x {module.shape[1]} matrix, and"
            f" the base model's has shape {found}"
        )
    return parent, leaf


class Gates:
    """The learnable gates of one adapter."""

    def __init__(self, by: By, ranks: Sequence[int], device: torch.device) -> None:
        self.by = by
        self._ranks = list(ranks)
        self._groups: dict[int, list[int]] = {}
        for place, rank in enumerate(ranks):
            self._groups.setdefault(rank, []).append(place)
        self.parameters: dict[int, Tensor] = {
            rank: _start(by, len(places), rank, device).requires_grad_()
            for rank, places in self._groups.items()
        }

    def matrices(self, strength: float = 1.0) -> list[Tensor]:
        """M of every module, in the adapter's order, (r, r)."""
        found: list[Tensor | None] = [None] * len(self._ranks)
        for rank, places in self._groups.items():
            stacked = self._stacked(self.parameters[rank], rank, strength)
            for place, matrix in zip(places, stacked, strict=True):
                found[place] = matrix
        return [matrix for matrix in found if matrix is not None]

    def state(self) -> dict[str, Tensor]:
        """A copy of the parameters, by rank."""
        return {str(rank): value.detach().clone() for rank, value in self.parameters.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set the parameters to what `state` returned."""
        with torch.no_grad():
            for rank, value in self.parameters.items():
                value.copy_(state[str(rank)])

    def _stacked(self, parameter: Tensor, rank: int, strength: float) -> Tensor:
        identity = torch.eye(rank, device=parameter.device)
        if self.by == "subspace":
            gram = parameter @ parameter.transpose(1, 2)
            attenuated: Tensor = torch.linalg.inv(identity + strength * gram)
            return attenuated
        # Straight-through: 0 or 1 forward, the sigmoid's slope backward. The threshold rises with
        # the strength: at 1 it is 0, at 0 every gate is open.
        soft = torch.sigmoid(parameter)
        threshold = float("-inf") if strength == 0 else torch.tensor(strength).log().item()
        hard = (parameter > threshold).float()
        gates = soft + (hard - soft).detach()
        return torch.diag_embed(gates.expand(-1, rank))


def _start(by: By, modules: int, rank: int, device: torch.device) -> Tensor:
    if by == "subspace":
        generator = torch.Generator().manual_seed(rank)
        noise = 0.02 * torch.randn(modules, rank, rank, generator=generator)
        return (START[by] * torch.eye(rank) + noise).to(device)
    return torch.full((modules, rank if by == "component" else 1), START[by], device=device)


def thin_svd(module: Module) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k) of `B·A = U·diag(S)·Vᵀ`, float64; ΔW is never formed."""
    q_b, r_b = torch.linalg.qr(module.B.double())
    q_a, r_a = torch.linalg.qr(module.A.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, q_a @ vh.T


def transform(module: Module, gate: Tensor) -> Tensor:
    """`T = B⁺·U·M·Uᵀ·B`, so that `B·T·A = U·M·Uᵀ·B·A`; (r, r), float64.

    U spans the columns of `B·A`, so the product is exact up to rounding.
    """
    B = module.B.double()
    U = thin_svd(module)[0]
    found: Tensor = torch.linalg.pinv(B) @ U @ gate.double().cpu() @ (U.T @ B)
    return found
