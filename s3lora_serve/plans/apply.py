"""Apply a plan's transforms: the weights file with B' = B·T in the place of B."""

from collections.abc import Callable

from torch import Tensor

from s3lora_serve.adapter.changed_weights import ChangedWeights, NewFactor, rounded_lora_b
from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.errors import PlanInvalid
from s3lora_serve.plans.schema import Plan

MAX_GROWTH = 1e-3
"""Largest relative growth of ‖ΔW‖_F: rounding B' to bfloat16 moves it by up to 2^-9 of an entry,
and by far less over a matrix. A plan removes; it never adds."""


def transformed_weights(
    adapter: Adapter, plan: Plan, between_modules: Callable[[], None] = lambda: None
) -> ChangedWeights | None:
    """The weights as the plan has them; None if it transforms nothing. The plan must fit.

    `between_modules` runs before each module and may raise to stop, for example at a deadline.

    Raises:
        PlanInvalid: a transform makes an update larger, not finite, or mere rounding.
    """
    modules = {module.name: module for module in adapter.modules}
    factors = []
    for planned in plan.modules:
        if planned.action == "transform":
            between_modules()
            factors.append(transformed(modules[planned.name], planned.matrix()))
    return ChangedWeights.of(adapter, factors) if factors else None


def transformed(module: Module, transform: Tensor) -> NewFactor:
    """B' = B·T, computed in float64 and rounded to the dtype that B is stored in.

    Raises:
        PlanInvalid: B' holds NaN or Inf as served, or its update is larger than the module's.
    """
    try:
        new = rounded_lora_b(module, module.B.double() @ transform.double())
    except ValueError as error:
        raise PlanInvalid(f"a transform {error}") from None
    if not new.after <= new.before * (1 + MAX_GROWTH):
        raise PlanInvalid(
            f"the transform of {module.name} makes ‖ΔW‖_F {new.after:g} of {new.before:g} (without"
            " scaling): a plan may not increase an update"
        )
    return new
