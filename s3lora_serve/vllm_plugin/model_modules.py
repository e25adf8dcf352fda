"""The served model's LoRA modules, and whether an adapter's modules are among them.

Workers read them from the model. API servers learn them from the workers, so that an adapter of
another model is refused before it is scored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.errors import DoesNotFitModel, RefusedByVLLM
from s3lora_serve.vllm_plugin import compat

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelModules:
    """Names and shapes of the modules that can have a LoRA; empty until they are known."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)  # (m, n) of ΔW, by vLLM's names
    mapper: Any = None  # from names in adapters to vLLM's; None: they are the same
    is_whole: bool = False  # False: a pipeline stage, with a part of the layers
    knows_names: bool = True  # False: the model's mapper can be read in workers alone

    @classmethod
    def of_workers(cls, answers: Iterable[Mapping[str, Any]]) -> "ModelModules":
        """The whole model, from what all of its workers answered."""
        shapes: dict[str, Shape] = {}
        mapper: Mapping[str, Any] | None = None
        for answer in answers:
            shapes |= {name: (m, n) for name, m, n in answer["modules"]}
            mapper = answer["mapper"]
        known = mapper is not None
        return cls(shapes, compat.mapper_of(mapper or {}), is_whole=True, knows_names=known)

    def as_plain(self) -> dict[str, Any]:
        """A worker's answer for `of_workers`, as plain data."""
        modules = [(name, m, n) for name, (m, n) in self.shapes.items()]
        return {"modules": modules, "mapper": compat.plain_mapper(self.mapper)}

    def check(self, adapter: Adapter) -> None:
        """Check an adapter against the whole model, before anything is computed.

        Raises:
            DoesNotFitModel: a module is not one of the model's, or has another shape there.
            RefusedByVLLM: vLLM cannot map a name.
        """
        if not (self.shapes and self.is_whole):
            return
        if len(adapter.modules) > len(self.shapes):
            raise DoesNotFitModel(
                f"the adapter has {len(adapter.modules)} modules, the served model can have a LoRA"
                f" on {len(self.shapes)}"
            )
        if self.knows_names:
            self.served_names(adapter)
            return
        known = set(self.shapes.values())
        for module in adapter.modules:
            if module.shape not in known:
                raise DoesNotFitModel(
                    f"module {module.name} updates a {module.shape[0]} x {module.shape[1]} matrix,"
                    " and the served model has no such LoRA module"
                )

    def served_names(self, adapter: Adapter) -> dict[str, str]:
        """vLLM's name of each module, after a check of every A and B against the model's modules.

        Raises:
            DoesNotFitModel, RefusedByVLLM: as `check`.
        """
        names = self.mapped([key for m in adapter.modules for key in m.keys])
        served: dict[str, str] = {}
        taken: set[str] = set()
        for module in adapter.modules:
            [*targets] = {names[key] for key in module.keys}
            target = targets[0]
            if len(targets) > 1 or target in taken:
                raise DoesNotFitModel(
                    f"module {module.name} does not map to one module of the model"
                )
            if target in self.shapes or self.is_whole:
                self._check_shape(module, target)
            served[module.name] = target
            taken.add(target)
        return served

    def mapped(self, keys: Iterable[str]) -> dict[str, str]:
        """vLLM's module name for each tensor name of an adapter (models may rename modules).

        Raises:
            RefusedByVLLM: vLLM cannot map a name.
        """
        try:
            return {key: compat.parse_fine_tuned_lora_name(key, self.mapper)[0] for key in keys}
        except ValueError as error:
            raise RefusedByVLLM(f"vLLM says: {error}") from None

    def _check_shape(self, module: Module, target: str) -> None:
        if target not in self.shapes:
            raise DoesNotFitModel(f"the served model has no LoRA on module {target}")
        if module.shape != self.shapes[target]:
            raise DoesNotFitModel(
                f"module {module.name} updates a {module.shape[0]} x {module.shape[1]} matrix, the"
                f" model's is {self.shapes[target][0]} x {self.shapes[target][1]}"
            )
