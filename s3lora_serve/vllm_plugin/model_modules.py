"""The served model's LoRA modules, and whether an adapter's modules are among them.

Workers read them from the model. API servers learn them from the workers, so that an adapter of
another model is refused before it is scored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.adapter.tensor_names import layout_of
from s3lora_serve.errors import DoesNotFitModel, NothingPlaced, RefusedByVLLM, Unscorable
from s3lora_serve.vllm_plugin import compat

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelModules:
    """Names and shapes of the modules that can have a LoRA; empty until they are known."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)  # (m, n) of ΔW, by vLLM's names
    mapper: Any = None  # from names in adapters to vLLM's; None: they are the same
    is_whole: bool = False  # False: a pipeline stage, with a part of the layers
    knows_names: bool = True  # False: the model's mapper can be read in workers alone
    skipped: tuple[str, ...] = ()  # prefixes of names that vLLM reads past, for this model
    # By the names that experts in one tensor have: how many, or 0 if vLLM takes them one by one.
    experts: Mapping[str, int] = field(default_factory=dict)
    pools: bool = False  # a pooling model, whose modules vLLM also finds without `model.`

    @classmethod
    def of_workers(cls, answers: Iterable[Mapping[str, Any]]) -> "ModelModules":
        """The whole model, from what all of its workers answered."""
        shapes: dict[str, Shape] = {}
        mapper: Mapping[str, Any] | None = None
        experts: dict[str, int] = {}
        skipped: tuple[str, ...] = ()
        pools = False
        for answer in answers:
            shapes |= {name: (m, n) for name, m, n in answer["modules"]}
            experts |= answer["experts"]
            mapper = answer["mapper"]
            skipped, pools = tuple(answer["skipped"]), answer["pools"]
        known = mapper is not None
        return cls(
            shapes,
            compat.mapper_of(mapper or {}),
            is_whole=True,
            knows_names=known,
            skipped=skipped,
            experts=experts,
            pools=pools,
        )

    def as_plain(self) -> dict[str, Any]:
        """A worker's answer for `of_workers`, as plain data."""
        return {
            "modules": [(name, m, n) for name, (m, n) in self.shapes.items()],
            "mapper": compat.plain_mapper(self.mapper),
            "experts": dict(self.experts),
            "skipped": list(self.skipped),
            "pools": self.pools,
        }

    def left_out(self, adapter: Adapter) -> tuple[str, ...]:
        """The adapter's modules that the whole model does not take; vLLM says nothing of them.

        Nothing is left out where the modules are not known. The others are checked.

        Raises:
            NothingPlaced: the model takes no module of the adapter.
            DoesNotFitModel: a module has another shape in the model, or two modules are one there.
            RefusedByVLLM: vLLM cannot map a name.
        """
        if not (self.shapes and self.is_whole):
            return ()
        if not self.knows_names:
            self._check_some_shape(adapter)
            return ()
        names = self._names([m for m in adapter.modules if not self._is_skipped(m)])
        self._check_layout_of_experts(adapter, names)
        left_out = tuple(
            m.name for m in adapter.modules if self._place(names.get(m.name)) not in self.shapes
        )
        if len(left_out) == len(adapter.modules):
            raise NothingPlaced(
                f"the served model has no LoRA on any of its {len(left_out)} modules, of which"
                f" {left_out[0]} is one{layout_of(adapter.modules[0].keys[0])}"
            )
        self._served(adapter.without(left_out), names)
        return left_out

    def vllm_names(self, adapter: Adapter) -> dict[str, str]:
        """vLLM's name of each module, after a check of every A and B against the model's modules.

        Raises:
            DoesNotFitModel: a module is not one of the model's, or has another shape there, or two
                modules are one there.
            RefusedByVLLM: vLLM cannot map a name.
        """
        return self._served(adapter, self._names(adapter.modules))

    def _names(self, modules: Sequence[Module]) -> dict[str, str]:
        """vLLM's name of each module."""
        names = self.mapped([key for module in modules for key in module.keys])
        found = {}
        for module in modules:
            [*targets] = {names[key] for key in module.keys}
            if len(targets) > 1:
                raise _not_one(module)
            found[module.name] = targets[0]
        return found

    def _served(self, adapter: Adapter, names: Mapping[str, str]) -> dict[str, str]:
        taken: set[tuple[str, int | None]] = set()
        for module in adapter.modules:
            place = self._place(names[module.name])
            own = place, module.expert.index if module.expert else None
            if own in taken:
                raise _not_one(module)
            if place in self.shapes or self.is_whole:
                self._check_shape(module, place)
            taken.add(own)
        return {module.name: names[module.name] for module in adapter.modules}

    def _place(self, name: str | None) -> str:
        """The model's module that vLLM puts a module of this name into."""
        if name is None:
            return ""
        whole = f"model.{name}"
        return whole if self.pools and name not in self.shapes and whole in self.shapes else name

    def _is_skipped(self, module: Module) -> bool:
        """Whether vLLM reads past a module: models may name prefixes (`lora_skip_prefixes`)."""
        [key, _] = module.keys
        return any(f".{each}" in key or key.startswith(each) for each in self.skipped)

    def _check_layout_of_experts(self, adapter: Adapter, names: Mapping[str, str]) -> None:
        """Check that the model takes experts in one tensor where the adapter has them so."""
        for module in adapter.modules:
            place = self._place(names.get(module.name))
            if module.expert is not None and self.experts.get(place) == 0:
                raise Unscorable(
                    "adapter_config.json names experts in one tensor in target_parameters, and"
                    f" vLLM takes those of this model one by one, as {module.name}, unless it was"
                    " started with --enable-mixed-moe-lora-format"
                )

    def _check_some_shape(self, adapter: Adapter) -> None:
        known = set(self.shapes.values())
        for module in adapter.modules:
            if module.shape not in known:
                raise DoesNotFitModel(
                    f"module {module.name} updates a {module.shape[0]} x {module.shape[1]} matrix,"
                    " and the served model has no such LoRA module"
                )

    def mapped(self, keys: Iterable[str]) -> dict[str, str]:
        """vLLM's module name for each tensor name of an adapter (models may rename modules).

        Raises:
            RefusedByVLLM: vLLM cannot map a name.
        """
        try:
            # A layer's experts in one tensor share its keys.
            own = dict.fromkeys(keys)
            return {key: compat.parse_fine_tuned_lora_name(key, self.mapper)[0] for key in own}
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
        count = module.expert.count if module.expert else None
        if count != self.experts.get(target):
            raise DoesNotFitModel(
                f"module {module.name} is one of {count or 'no'} experts in one tensor, the model"
                f" has {self.experts.get(target, 'none')} so"
            )


def _not_one(module: Module) -> DoesNotFitModel:
    return DoesNotFitModel(f"module {module.name} does not map to one module of the model")
