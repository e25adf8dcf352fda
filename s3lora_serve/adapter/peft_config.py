"""Parse adapter_config.json and check the fields that the gate needs, as PEFT defines them."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s3lora_serve.adapter.bounded_json import parse_json
from s3lora_serve.adapter.rank_alpha_patterns import ModulePatterns
from s3lora_serve.errors import ConfigInvalid, InitialisedOnBase, Unscorable
from s3lora_serve.policy.canonical import canonical_digest

MAX_ALPHA = 1e30
"""Keeps scalings finite; limits.max_scaling is the bound that operators set."""

MAX_RANK_CLAIMED = 2**16
"""No projection is wider. The bound keeps a hostile integer out of the arithmetic."""

MAX_CONFIG_VALUES = 6 * 2**15
"""rank_pattern, alpha_pattern and target_modules of the largest number of modules have five for
each."""

PLAIN_INITS = "gaussian", "eva", "orthogonal", "mica", "lora_ga"
"""Initialisations that leave the base model as it is. Source: vLLM, `PEFTHelper`; PEFT."""

T = TypeVar("T", int, float)


class PeftConfig(BaseModel):
    """The fields of PEFT's LoraConfig that decide what an adapter's tensors mean."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    r: int = Field(ge=1, le=MAX_RANK_CLAIMED)
    lora_alpha: float = Field(ge=-MAX_ALPHA, le=MAX_ALPHA)
    use_rslora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    bias: str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    layer_replication: list[Any] | None = None
    alora_invocation_tokens: list[Any] | None = None
    use_qalora: bool | None = None
    use_bdlora: dict[str, Any] | None = None
    init_lora_weights: bool | str | None = None
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A checked adapter_config.json."""

    fields: PeftConfig
    raw: dict[str, Any]
    digest: str  # sha256 of the canonical JSON
    ranks: ModulePatterns[int]
    alphas: ModulePatterns[float]
    target_parameters: frozenset[str] = frozenset()  # tensors that PEFT adapts by their names

    def rank(self, module: str) -> int:
        """The configured rank of a module (PEFT name, without prefix)."""
        rank = self.ranks.get(module)
        return self.fields.r if rank is None else rank

    def scaling(self, module: str) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with the module's own alpha and r."""
        own = self.alphas.get(module)
        alpha = self.fields.lora_alpha if own is None else own
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.fields.use_rslora else rank)


def parse_config(text: bytes, on_unscorable: str = "reject") -> AdapterConfig:
    """Parse and check adapter_config.json.

    `on_unscorable` is the policy's setting for parts that the index is not defined for.

    Raises:
        ConfigInvalid: it is not JSON, a field has a wrong type or value, or it is not a LoRA.
        InitialisedOnBase: PEFT would change the base model's weights to load it.
        Unscorable: it uses parts that the index is not defined for, and the policy refuses them.
    """
    try:
        raw = parse_json(text, MAX_CONFIG_VALUES)
        digest = canonical_digest(raw)
        fields = PeftConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "adapter_config.json"
        # A missing field's input is the whole file, which may be a link to another user's secret.
        whole = problem["type"] == "missing" or not problem["loc"]
        shown = "" if whole else f" (got {str(problem['input'])[:40]!r})"
        raise ConfigInvalid(f"{where}: {problem['msg']}{shown}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"adapter_config.json cannot be parsed: {error}") from None
    if fields.peft_type != "LORA":
        raise ConfigInvalid(f"peft_type is {fields.peft_type[:40]!r}, expected 'LORA'")
    if "target_modules" not in raw:
        raise ConfigInvalid("target_modules is missing, and vLLM loads no adapter without it")
    init = fields.init_lora_weights
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise InitialisedOnBase(f"init_lora_weights is {init[:40]!r}")
    _check_scorable(fields, on_unscorable)
    ranks = _patterns("rank_pattern", fields.rank_pattern or {}, 1, MAX_RANK_CLAIMED)
    alphas = _patterns("alpha_pattern", fields.alpha_pattern or {}, -MAX_ALPHA, MAX_ALPHA)
    return AdapterConfig(
        fields, raw, digest, ranks, alphas, frozenset(fields.target_parameters or ())
    )


def _patterns(name: str, values: dict[str, T], least: float, most: float) -> ModulePatterns[T]:
    for key, value in values.items():
        if not least <= value <= most:
            raise ConfigInvalid(f"{name} gives {key[:80]!r} the value {str(value)[:40]}")
    return ModulePatterns(name, values)


def _check_scorable(fields: PeftConfig, on_unscorable: str) -> None:
    if on_unscorable == "admit":
        return
    asked = {
        "use_dora": fields.use_dora,
        "lora_bias": fields.lora_bias,
        "bias": fields.bias not in (None, "none") and fields.bias,
        "modules_to_save": fields.modules_to_save,
        "layer_replication": fields.layer_replication,
        "alora_invocation_tokens": fields.alora_invocation_tokens,
        "use_qalora": fields.use_qalora,
        "use_bdlora": fields.use_bdlora,
    }
    if on_unscorable == "strip":
        del asked["modules_to_save"]  # its tensors can be removed; the others change the modules
    for name, value in asked.items():
        if value:
            raise Unscorable(f"adapter_config.json sets {name} to {str(value)[:80]}")
