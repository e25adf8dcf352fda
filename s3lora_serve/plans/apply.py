"""Apply a plan's transforms: the weights file with B' = B·T in the place of B.

Header and layout stay, and every other byte: vLLM and the reader take it as they took the
adapter's own file.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s3lora_serve.adapter.private_copy import CONFIG_NAME, OWN_FOLDER, WEIGHTS_NAME
from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.errors import PlanInvalid
from s3lora_serve.plans.schema import Plan

MAX_GROWTH = 1e-3
"""Largest relative growth of ‖ΔW‖_F: rounding B' to bfloat16 moves it by up to 2^-9 of an entry,
and by far less over a matrix. A plan removes; it never adds."""

MAX_CANCELLATION = 1e3
"""Largest ‖B'‖_F·‖A‖_F/‖B·A‖_F, as for the adapter's own factors: beyond it the served update is
the rounding of the engine's dtype."""


@dataclass(frozen=True, slots=True)
class TransformedWeights:
    """The weights file of an adapter with some of its tensors replaced."""

    own: memoryview
    replaced: dict[str, tuple[int, bytes]]  # by tensor name: offset in the file, new bytes

    def chunks(self) -> Iterator[memoryview]:
        """The whole file in parts, in their order."""
        position = 0
        for start, data in sorted(self.replaced.values()):
            yield self.own[position:start]
            yield memoryview(data)
            position = start + len(data)
        yield self.own[position:]

    def digest(self) -> str:
        """sha256 of the file."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return "sha256:" + digest.hexdigest()

    def write_into(self, folder: Path) -> None:
        """Put the file in the place of a private copy's weights, whose own move to OWN_FOLDER.

        The private copy is not in the store yet: a process that is killed here leaves nothing that
        is ever served.

        Raises:
            OSError: it cannot be written.
        """
        own = folder / OWN_FOLDER
        own.mkdir(mode=0o700)
        (own / CONFIG_NAME).write_bytes((folder / CONFIG_NAME).read_bytes())
        (folder / WEIGHTS_NAME).rename(own / WEIGHTS_NAME)
        with (folder / WEIGHTS_NAME).open("xb") as file:
            for chunk in self.chunks():
                file.write(chunk)


def transformed_weights(
    adapter: Adapter, plan: Plan, between_modules: Callable[[], None] = lambda: None
) -> TransformedWeights | None:
    """The weights as the plan has them; None if it transforms nothing. The plan must fit.

    `between_modules` runs before each module and may raise to stop, for example at a deadline.

    Raises:
        PlanInvalid: a transform makes an update larger, not finite, or mere rounding.
    """
    modules = {module.name: module for module in adapter.modules}
    entries = {entry.name: entry for entry in adapter.header.entries}
    replaced = {}
    for planned in plan.modules:
        if planned.action == "transform":
            between_modules()
            module = modules[planned.name]
            B = transformed(module, planned.matrix())
            key = module.keys[1]
            replaced[key] = entries[key].start, B.view(torch.uint8).numpy().tobytes()
    return TransformedWeights(adapter.copy.weights, replaced) if replaced else None


def transformed(module: Module, transform: Tensor) -> Tensor:
    """B' = B·T, computed in float64 and rounded to the dtype that B is stored in.

    Raises:
        PlanInvalid: B' holds NaN or Inf as served, or its update is larger than the module's.
    """
    A, B = module.A.double(), module.B.double()
    new = (B @ transform.double()).to(module.B.dtype).contiguous()
    # No server holds LoRA weights in a wider dtype than float32.
    served = new.float() if new.dtype == torch.float64 else new
    if not served.isfinite().all():
        raise PlanInvalid(f"the transform of {module.name} makes its lora_B NaN or Inf")
    before, after = _update_norm(B, A), _update_norm(new.double(), A)
    if not after <= before * (1 + MAX_GROWTH):
        raise PlanInvalid(
            f"the transform of {module.name} makes ‖ΔW‖_F {after:g} of {before:g} (without"
            " scaling): a plan may not increase an update"
        )
    factors = float(new.double().norm() * A.norm())
    if not factors <= MAX_CANCELLATION * before:
        raise PlanInvalid(
            f"the transform of {module.name} makes factors of {factors:g} that cancel: the module's"
            f" update is {before:g}"
        )
    return new


def _update_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖_F = √Σ (BᵀB ∘ AAᵀ), without forming B·A."""
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return max(square, 0.0) ** 0.5 if square == square else square
