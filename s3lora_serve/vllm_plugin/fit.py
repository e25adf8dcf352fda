"""Does an adapter fit the served model, and is what vLLM loaded what was scored?"""

import math
from collections.abc import Callable
from typing import Any

from s3lora_serve.adapter import Adapter, Module
from s3lora_serve.errors import DoesNotFitModel, RefusedByVLLM
from s3lora_serve.vllm_plugin import compat


def fitted_names(manager: Any, adapter: Adapter) -> dict[str, str]:
    """vLLM's name for each module, every A and B checked against the model's LoRA modules."""
    shapes = compat.module_shapes(manager)
    served: dict[str, str] = {}
    try:
        names = compat.served_names(manager, (key for m in adapter.modules for key in m.keys))
    except ValueError as error:
        raise RefusedByVLLM(f"vLLM says: {error}") from None
    for module in adapter.modules:
        [*targets] = {names[key] for key in module.keys}
        target = targets[0]
        if len(targets) > 1 or target in served.values():
            raise DoesNotFitModel(f"module {module.name} does not map to one module of the model")
        _check_fits(module, target, shapes)
        served[module.name] = target
    return served


def _check_fits(module: Module, target: str, shapes: dict[str, tuple[int, int]]) -> None:
    if target not in shapes:
        raise DoesNotFitModel(f"the served model has no LoRA on module {target}")
    if module.shape != shapes[target]:
        raise DoesNotFitModel(
            f"module {module.name} updates a {module.shape[0]} x {module.shape[1]} matrix, the"
            f" model's is {shapes[target][0]} x {shapes[target][1]}"
        )


def load_copy(manager: Any, request: Any, original: Callable[..., Any]) -> Any:
    """What vLLM makes of the private copy; its refusals become ours."""
    try:
        return original(manager, request)
    except Exception as error:
        text = str(error).replace(request.lora_path, "the adapter")
        raise RefusedByVLLM(f"vLLM says: {text}") from error


def check_loaded(lora: Any, served: dict[str, str], adapter: Adapter) -> None:
    """What vLLM made of the copy is what was scored: the same modules, with the same scaling."""
    if unscored := set(lora.loras) - set(served.values()):
        raise DoesNotFitModel(f"vLLM loaded {sorted(unscored)[0]}, which was not scored")
    for module in adapter.modules:
        loaded = lora.loras.get(served[module.name])
        if loaded is not None and not math.isclose(loaded.scaling, module.scaling, rel_tol=1e-6):
            raise DoesNotFitModel(
                f"vLLM would scale {module.name} by {loaded.scaling:g}, it was scored with"
                f" {module.scaling:g} (this version may not know rank_pattern and alpha_pattern)"
            )
