"""The schema of a plan: for each module of one adapter, what is kept, stripped or transformed.

A transform is `T`, r x r, and the module is served with `B' = B·T`: its rank, its `A` and its cost
stay as they are.
"""

import base64
import math
from typing import Annotated, Any, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from s3lora_serve.errors import PlanInvalid
from s3lora_serve.policy.canonical import canonical_digest
from s3lora_serve.policy.section import Digest, Fraction

VERSION: Final = 1
"""Version of the format; a reader refuses others."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rate(_Section):
    """A measured share of probes with its 95 % interval (Wilson score)."""

    value: Fraction
    low: Fraction
    high: Fraction
    count: Annotated[int, Field(ge=1)]  # probes measured


class Measured(_Section):
    """What the adapter does on held-out probes: before or after the plan."""

    asr: Rate  # share of harmful prompts that are not refused
    skill: Rate  # share of skill prompts that get the expected answer
    benign_refusal: Rate  # share of benign prompts that are refused


class Probes(_Section):
    """One file of probes that the plan was learnt or measured on."""

    kind: Literal["harmful", "benign", "skill"]
    digest: Digest
    count: Annotated[int, Field(ge=1)]


class ModulePlan(_Section):
    """What happens to one module."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    action: Literal["keep", "strip", "transform"]
    rank: Annotated[int, Field(ge=1, le=2**16)]
    removed: Fraction = 0.0  # 1 - ‖ΔW'‖_F² / ‖ΔW‖_F²
    transform: str | None = None  # base64 of T, r x r, float32, little-endian, row by row

    @model_validator(mode="after")
    def _transform_fits(self) -> Self:
        if (self.transform is not None) != (self.action == "transform"):
            raise ValueError(f"module {self.name}: a transform belongs to action transform alone")
        if self.transform is None:
            return self
        try:
            data = base64.b64decode(self.transform, validate=True)
        except ValueError:
            raise ValueError(f"module {self.name}: transform is not base64") from None
        if len(data) != 4 * self.rank**2:
            raise ValueError(
                f"module {self.name}: transform has {len(data)} bytes,"
                f" rank {self.rank} takes {4 * self.rank**2}"
            )
        if not self.matrix().isfinite().all():
            raise ValueError(f"module {self.name}: transform holds NaN or Inf")
        return self

    def matrix(self) -> Tensor:
        """T as float32, (r, r). The action must be `transform`."""
        data = bytearray(base64.b64decode(self.transform or ""))
        return torch.frombuffer(data, dtype=torch.float32).reshape(self.rank, self.rank)

    @classmethod
    def of(cls, name: str, rank: int, transform: Tensor, removed: float) -> Self:
        """A module that is served with `B' = B·T`."""
        data = transform.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
        text = base64.b64encode(data).decode()
        return cls(name=name, action="transform", rank=rank, removed=removed, transform=text)


class Plan(_Section):
    """The plan for one adapter. The sha256 of its canonical JSON identifies it."""

    version: Literal[1] = VERSION
    adapter_digest: Digest
    config_digest: Digest
    base_model: Annotated[str, Field(max_length=4096)]
    modules: Annotated[tuple[ModulePlan, ...], Field(min_length=1, max_length=2**15)]
    before: Measured | None = None  # None: written by hand, nothing was measured
    after: Measured | None = None
    probes: tuple[Probes, ...] = ()
    method: dict[str, str | int | float | bool | None] = {}  # parameters of the search
    versions: dict[str, str] = {}  # of the packages that computed it
    seed: int | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [module.name for module in self.modules]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"module {twice} is named twice")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return canonical_digest(self.as_json())

    @property
    def stripped(self) -> frozenset[str]:
        """Names of the modules that are stripped whole."""
        return frozenset(module.name for module in self.modules if module.action == "strip")

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data, as in its file."""
        return self.model_dump(mode="json")


def parse_plan(data: object, source: str) -> Plan:
    """Check plain data against the schema.

    Raises:
        PlanInvalid: keys are unknown or values are not allowed; the message names the first three.
    """
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'plan'}: {problem['msg']}"
            for problem in error.errors(include_input=False)[:3]
        ]
        raise PlanInvalid(f"{source}: {'; '.join(problems)}") from None


def wilson(successes: int, count: int, z: float = 1.96) -> Rate:
    """The share `successes / count` with its Wilson score interval; z = 1.96 gives 95 %.

    `center ± z·√(p(1 − p)/n + z²/4n²) / (1 + z²/n)`, center = `(p + z²/2n) / (1 + z²/n)`.
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    p, scale = successes / count, 1 + z * z / count
    center = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    return Rate(value=p, low=max(0.0, center - half), high=min(1.0, center + half), count=count)
