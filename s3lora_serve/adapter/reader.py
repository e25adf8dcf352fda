"""Read a PEFT LoRA adapter: its modules and their factors, checked before any computation."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s3lora_serve.adapter.peft_config import AdapterConfig, parse_config
from s3lora_serve.adapter.private_copy import PrivateCopy
from s3lora_serve.adapter.safetensors_format import Header, read_header, tensors
from s3lora_serve.adapter.stacked_experts import Expert, stacked_pair
from s3lora_serve.adapter.tensor_names import (
    MAX_NAME_LENGTH,
    PREFIX,
    factor_name,
    is_ignored,
    layout_of,
    without_prefix,
)
from s3lora_serve.errors import (
    ModuleTwice,
    NotFinite,
    OverLimit,
    PartnerMissing,
    ShapesDoNotFit,
    Unscorable,
)
from s3lora_serve.policy.limits import Limits

_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
MAX_MODULES = 2**15
"""The largest mixtures of experts have about 20 000 projections."""

MAX_CANCELLATION = 1e3
"""Largest ‖B‖_F·‖A‖_F/‖B·A‖_F that is scored. Trained factors have about √r. From 2^8 on, rounding
the product to bfloat16 causes an error as large as the product, so the index describes an update
that is never served."""


@dataclass(frozen=True, slots=True)
class Module:
    """One LoRA module, `ΔW = scaling · B · A`. The factors keep their stored dtype."""

    name: str  # PEFT name without prefix, as in model.layers.3.self_attn.q_proj
    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    scaling: float
    keys: tuple[str, str]  # names of the A and B tensors in the file
    expert: Expert | None = None  # whose part of these tensors it is; None: all of them is its own

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def part(self, side: str, whole: Tensor) -> Tensor:
        """A view of what is this module's of a tensor of the file, or of one in its shape."""
        return whole if self.expert is None else self.expert.of(side, whole)

    @property
    def is_expert(self) -> bool:
        """Whether it is of one of a layer's experts. vLLM takes all of them or none."""
        return ".experts." in self.name

    @property
    def projection(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The first number in the name, such as 3 in model.layers.3.…; None if there is none."""
        return next((int(p) for p in self.name.split(".") if p.isdecimal() and len(p) < 7), None)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter in private memory."""

    config: AdapterConfig
    modules: tuple[Module, ...]  # in natural order of their names
    header: Header
    copy: PrivateCopy
    unscorable: tuple[str, ...] = ()  # names of tensors that the index is not defined for
    ignored: tuple[str, ...] = ()  # names of tensors that vLLM reads past

    def without(self, modules: Collection[str]) -> "Adapter":
        """The adapter without some modules, in the same file."""
        if not modules:
            return self
        left_out = frozenset(modules)
        return replace(self, modules=tuple(m for m in self.modules if m.name not in left_out))


def read_adapter(
    copy: PrivateCopy,
    limits: Limits,
    on_unscorable: str = "reject",
    between_modules: Callable[[], None] = lambda: None,
) -> Adapter:
    """Read and check an adapter from its private copy. Tensors keep their stored dtype.

    `on_unscorable` decides about tensors that the index is not defined for. `admit` accepts all of
    them. `strip` accepts those whose removal leaves the other tensors as they were trained. All
    others are refused; `Adapter.unscorable` lists the accepted ones by name. Tensors that vLLM
    reads past are not looked at.

    `between_modules` runs before each module and may raise to stop, for example at a deadline.

    Raises:
        AdapterRejected: it is not a well-formed plain LoRA; there is one subclass for each cause.
    """
    config = parse_config(copy.config, on_unscorable)
    header = read_header(copy.weights)
    ignored = frozenset(entry.name for entry in header.entries if is_ignored(entry.name))
    sides, unscorable = _pairs(tensors(header, copy.weights, skipped=ignored), on_unscorable)
    modules: dict[str, Module] = {}
    for name in sorted(sides, key=_natural):
        between_modules()
        for module in _modules(name, sides, config, limits):
            if module.name in modules:
                raise ModuleTwice(f"{modules[module.name].keys[0]} and {module.keys[0]} are one's")
            modules[module.name] = module
        if len(modules) > MAX_MODULES:
            raise OverLimit(f"the adapter has more than {MAX_MODULES} modules")
    left = tuple(sorted(unscorable)), tuple(sorted(ignored))
    return Adapter(config, tuple(modules.values()), header, copy, *left)


_Sides = dict[str, dict[str, tuple[str, Tensor]]]
"""By module and side: the tensor's name in the file, and the tensor."""


def _pairs(named: Iterable[tuple[str, Tensor]], on_unscorable: str) -> tuple[_Sides, list[str]]:
    """The factors of each module, and the names of other tensors that the policy accepts."""
    sides: _Sides = {}
    unscorable: list[str] = []
    for key, tensor in named:
        factor = factor_name(key)
        if factor is None:
            _check_other(key, tensor, on_unscorable)
            unscorable.append(key)
            continue
        factors = sides.setdefault(factor.module, {})
        if factor.side in factors:
            raise ModuleTwice(f"{factors[factor.side][0]} and {key} are one module's")
        factors[factor.side] = key, tensor
    if not sides:
        raise PartnerMissing("the adapter has no modules")
    if len(sides) > MAX_MODULES:
        raise OverLimit(f"the adapter has {len(sides)} modules, over {MAX_MODULES}")
    for key in unscorable:
        # vLLM loads an embedding's factors into the module of the same name.
        if (stem := without_prefix(key).partition(".lora_embedding")[0]) in sides:
            raise ModuleTwice(f"{key} and a lora_A or lora_B are one module's, {stem}")
    return sides, unscorable


def _check_other(key: str, tensor: Tensor, on_unscorable: str) -> None:
    """Check a tensor that is no factor of a linear module."""
    if not _may_pass(key, on_unscorable):
        raise Unscorable(
            f"tensor {key[:120]!r} is not a lora_A or lora_B of a linear module{layout_of(key)}"
        )
    if not tensor.isfinite().all():
        raise NotFinite(f"tensor {key} holds NaN or Inf")


def _may_pass(key: str, on_unscorable: str) -> bool:
    """Whether the policy accepts a tensor that the index is not defined for."""
    if len(key) > MAX_NAME_LENGTH or not _PLAIN.fullmatch(key) or PREFIX in without_prefix(key):
        return False
    if on_unscorable == "strip":
        # Without its magnitudes or biases, a module is not the one that was trained.
        return not key.endswith(
            (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".bias")
        )
    return on_unscorable == "admit"


def _modules(
    name: str,
    sides: Mapping[str, Mapping[str, tuple[str, Tensor]]],
    config: AdapterConfig,
    limits: Limits,
) -> list[Module]:
    """The module of a pair of factors, or those of the experts that it is of."""
    for side in "AB":
        if side not in sides[name]:
            raise PartnerMissing(f"module {name} has no lora_{side}")
    (key_a, A), (key_b, B) = sides[name]["A"], sides[name]["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
        raise ShapesDoNotFit(
            f"module {name} has lora_A of shape {tuple(A.shape)} and lora_B of {tuple(B.shape)}"
        )
    pair = stacked_pair(name, sides.keys(), config.target_parameters)
    configured = config.rank(pair.name if pair else name)
    rank = configured if pair and A.shape[0] % configured == 0 else A.shape[0]
    if rank < limits.min_rank:
        raise OverLimit(f"module {name} has rank {rank}, under limits.min_rank {limits.min_rank}")
    if rank > limits.max_rank:
        raise OverLimit(f"module {name} has rank {rank}, over limits.max_rank {limits.max_rank}")
    if rank != configured:
        if config.target_parameters and rank % configured == 0:
            raise Unscorable(
                f"module {name} has rank {rank} with an r of {configured}: of tensors that hold"
                " several matrices (target_parameters), vLLM serves only those of .experts"
            )
        raise ShapesDoNotFit(
            f"module {name} has rank {rank}, adapter_config.json says {configured}"
            f"{' for each expert' if pair else ''}"
        )
    if pair is None:
        return [Module(name, A, B, config.scaling(name), (key_a, key_b))]
    count, scaling = A.shape[0] // rank, config.scaling(pair.name)
    if count > MAX_MODULES:
        raise OverLimit(f"module {name} has {count} experts, over {MAX_MODULES}")
    experts = (Expert(index, count) for index in range(count))
    return [
        Module(pair.module(e.index), e.of("A", A), e.of("B", B), scaling, (key_a, key_b), e)
        for e in experts
    ]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 10 after layer 9. It orders any two names."""
    return [
        (0, int(part), "")
        if part.isascii() and part.isdecimal() and len(part) < 19
        else (1, 0, part)
        for part in re.split(r"(\d+)", name, flags=re.ASCII)
    ]


def as_served(factor: Tensor) -> Tensor:
    """A factor in at most float32: no server holds LoRA weights in a wider dtype.

    Values that float32 cannot hold are served as zero or infinity, and are scored as such.
    """
    return factor.float() if factor.dtype == torch.float64 else factor
