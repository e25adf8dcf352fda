"""Experts whose weights are one tensor: PEFT's layout, read as one module for each expert.

PEFT adapts such a tensor by its parameter's name (`target_parameters`). lora_A is (experts·r, in),
with the rows of one expert together. lora_B is (out, r·experts), with the columns of one rank
together. A layer has two pairs: `experts.base_layer` is of gate_up_proj, `experts` of down_proj.

Source: PEFT, `ParamWrapper`; vLLM, `LoRAModelManager._stack_moe_lora_weights`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from s3lora_serve.errors import Unscorable

PARAMETERS = "gate_up_proj", "down_proj"
"""The parameters that hold all experts of a layer, in the order in which PEFT wraps them."""

_HOLDER, _INNER = ".experts", ".base_layer"


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's place in the factors of all experts of a layer."""

    index: int
    count: int

    def of(self, side: str, whole: Tensor) -> Tensor:
        """A view of this expert's factor.

        Shape: A (count·r, n) -> (r, n); B (m, r·count) -> (m, r).
        """
        if side == "B":
            return whole[:, self.index :: self.count]
        rank = whole.shape[0] // self.count
        return whole[self.index * rank : (self.index + 1) * rank]


class StackedPair(NamedTuple):
    """A pair of factors of all experts of a layer."""

    layer: str  # as model.layers.3.mlp.experts
    parameter: str  # one of PARAMETERS

    @property
    def name(self) -> str:
        """The parameter's name, which rank_pattern and alpha_pattern match."""
        return f"{self.layer}.{self.parameter}"

    def module(self, index: int) -> str:
        """The name of one expert's module, as of adapters that hold experts one by one."""
        return f"{self.layer}.{index}.{self.parameter}"


def stacked_pair(name: str, names: Collection[str], targets: Collection[str]) -> StackedPair | None:
    """What a pair of factors is of; None if it is an ordinary module's.

    Args:
        name: the pair's name in the file, without prefix.
        names: of all pairs in the file.
        targets: `target_parameters` of the configuration.

    Raises:
        Unscorable: which parameter it is of cannot be said.
    """
    if not targets:
        return None
    layer = name.removesuffix(_INNER)
    if not layer.endswith(_HOLDER):
        return None
    adapted = [each for each in PARAMETERS if _is_targeted(f"{layer}.{each}", targets)]
    pairs = [layer + _INNER, layer]
    held = [pair for pair in pairs if pair in names]
    if held != pairs[len(pairs) - len(adapted) :]:
        raise Unscorable(
            f"the experts of {layer} have {len(held)} pairs of factors, and target_parameters in"
            f" adapter_config.json name {len(adapted)} of {' and '.join(PARAMETERS)}"
        )
    return StackedPair(layer, adapted[held.index(name)])


def _is_targeted(parameter: str, targets: Collection[str]) -> bool:
    """As PEFT matches: the whole name, or its end after a dot."""
    parts = parameter.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))
