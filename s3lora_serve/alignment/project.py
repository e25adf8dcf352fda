"""Project the updates of modules on what alignment changed: `B' = C·B`."""

from collections.abc import Callable, Collection

from s3lora_serve.adapter.changed_weights import ChangedWeights, rounded_lora_b
from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.alignment.reference_file import Reference
from s3lora_serve.errors import ReferenceUnfit


def projected_weights(
    adapter: Adapter,
    reference: Reference,
    names: Collection[str],
    between_modules: Callable[[], None] = lambda: None,
) -> ChangedWeights:
    """The weights with `B' = C_k·B = U·diag(σ²)·UᵀB/‖V‖_F` for the modules named.

    C is scaled as Safe LoRA scales it, by ‖V‖_F and not to a projection: an update along a
    direction with σ² > ‖V‖_F grows. B' is computed in float64 and rounded to B's dtype.

    Source: Safe LoRA, arXiv 2405.16833.

    Raises:
        ReferenceUnfit: a B' is not finite, or mere rounding.
    """
    factors = []
    for module in adapter.modules:
        if module.name in names:
            between_modules()
            subspace = reference.subspaces[module.name]
            U = subspace.U.double()
            over = 1 / subspace.frobenius if subspace.frobenius else 0.0
            weights = subspace.singular_values.square().unsqueeze(-1) * over
            try:
                factors.append(rounded_lora_b(module, U @ (weights * (U.mT @ module.B.double()))))
            except ValueError as error:
                raise ReferenceUnfit(f"the projection {error}") from None
    return ChangedWeights.of(adapter, factors)
