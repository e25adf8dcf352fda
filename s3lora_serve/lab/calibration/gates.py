"""Gates in an adapter's updates: `ΔW' = U·M·Uᵀ·ΔW` for each module, `ΔW = U·S·Vᵀ` from its factors.

M acts on the column space of ΔW, so nothing is added that the adapter had not. Which M are learnt:
`gate_families.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.errors import DoesNotFitModel, NotFinite


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
            for gate, s in zip(gates, self._spectra(gates), strict=True)
        ]
        return torch.stack(shares)

    def changes(self, gates: Sequence[Tensor]) -> Tensor:
        """`‖(M − I)·S‖_F / ‖S‖_F` for each module, float32: 0 if the update stays as it is."""
        found = [
            (gate * s - s.diag()).norm() / s.norm().clamp(min=1e-15)
            for gate, s in zip(gates, self._spectra(gates), strict=True)
        ]
        return torch.stack(found)

    def removed_share(self, gates: Sequence[Tensor]) -> Tensor:
        """The removed share of Σ‖ΔW‖_F² over all modules, float32."""
        energy = torch.stack([(s**2).sum() for s in self._spectra(gates)])
        return (self.removed_shares(gates) * energy).sum() / energy.sum().clamp(min=1e-30)

    def _spectra(self, gates: Sequence[Tensor]) -> list[Tensor]:
        """The singular values of each update, where its gate is."""
        return [layer.S.to(gate.device) for layer, gate in zip(self.layers, gates, strict=True)]


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


def thin_svd(module: Module) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k) of `B·A = U·diag(S)·Vᵀ`, float64; ΔW is never formed."""
    return svd_of_product(module.B, module.A)


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k) of `B·A = U·diag(S)·Vᵀ`, float64."""
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().T)
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
