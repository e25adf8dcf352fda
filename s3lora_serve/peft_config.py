"""adapter_config.json: what the gate needs of it, checked. Meaning as in PEFT's LoraConfig."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s3lora_serve.errors import ConfigInvalid, Unscorable

MAX_PATTERN_LENGTH = 128
"""Longest rank_pattern or alpha_pattern key tried; PEFT writes module names there."""

MAX_PATTERNS = 400
"""Keys of both pattern maps together. vLLM matches each with every module, and compiles anew what
its cache of 500 patterns does not hold: a millisecond each time, in the engine's loop."""

MAX_ALPHA = 1e30
"""Keeps scalings finite; limits.max_scaling is what bounds them."""

MAX_RANK_CLAIMED = 2**16
"""No projection is wider; keeps a hostile integer out of the arithmetic."""

_SAFE_PATTERN = re.compile(r"[\w.\-|\\^$]*[*+]?[\w.\-|\\^$]*", re.ASCII)
"""Keys are regular expressions of the adapter's owner: no groups and at most one repetition, so
that matching a name costs its length squared at the worst."""


T = TypeVar("T", int, float)
Patterns = tuple[tuple[re.Pattern[str], T], ...]


class PeftConfig(BaseModel):
    """The fields of PEFT's LoraConfig that decide what an adapter's tensors mean."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    r: int = Field(ge=1, le=MAX_RANK_CLAIMED)
    lora_alpha: float = Field(ge=-1e30, le=1e30)
    use_rslora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    bias: str | None = None
    modules_to_save: list[str] | None = None
    layer_replication: list[Any] | None = None
    alora_invocation_tokens: list[Any] | None = None
    use_qalora: bool | None = None
    use_bdlora: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A checked adapter_config.json."""

    fields: PeftConfig
    raw: dict[str, Any]
    digest: str  # sha256 of the canonical JSON
    ranks: Patterns[int]
    alphas: Patterns[float]

    def rank(self, module: str) -> int:
        """The rank the configuration gives a module (PEFT name, without prefix)."""
        return _matching(self.ranks, module, self.fields.r)

    def scaling(self, module: str) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with the module's own alpha and r."""
        alpha = _matching(self.alphas, module, self.fields.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.fields.use_rslora else rank)


def parse_config(text: bytes, on_unscorable: str = "reject") -> AdapterConfig:
    """Parse and check adapter_config.json.

    `on_unscorable` is the policy's word on parts that the index is not defined for.

    Raises:
        ConfigInvalid: not JSON, a field of the wrong type, or not a LoRA.
        Unscorable: it asks for parts the index is not defined for.
    """
    try:
        raw = json.loads(text)
        canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"))
        fields = PeftConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "adapter_config.json"
        # Of a missing field the input is the whole file, which may be a link to somebody's secret.
        whole = problem["type"] == "missing" or not problem["loc"]
        shown = "" if whole else f" (got {str(problem['input'])[:40]!r})"
        raise ConfigInvalid(f"{where}: {problem['msg']}{shown}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"adapter_config.json is not JSON: {error}") from None
    if fields.peft_type != "LORA":
        raise ConfigInvalid(f"peft_type is {fields.peft_type[:40]!r}, expected 'LORA'")
    _check_scorable(fields, on_unscorable)
    digest = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    count = len(fields.rank_pattern or {}) + len(fields.alpha_pattern or {})
    if count > MAX_PATTERNS:
        raise ConfigInvalid(
            f"rank_pattern and alpha_pattern have {count} keys, over {MAX_PATTERNS}"
        )
    ranks = _compiled("rank_pattern", fields.rank_pattern or {}, 1, MAX_RANK_CLAIMED)
    alphas = _compiled("alpha_pattern", fields.alpha_pattern or {}, -MAX_ALPHA, MAX_ALPHA)
    return AdapterConfig(fields, raw, digest, ranks, alphas)


def _compiled(name: str, patterns: dict[str, T], least: float, most: float) -> Patterns[T]:
    """Each key as PEFT matches it: against a suffix of the module's name that starts at a dot."""
    compiled = []
    for pattern, value in patterns.items():
        if len(pattern) > MAX_PATTERN_LENGTH or not _SAFE_PATTERN.fullmatch(pattern):
            raise ConfigInvalid(f"{name} has the key {pattern[:80]!r}, expected a module name")
        if not least <= value <= most:
            raise ConfigInvalid(f"{name} gives {pattern!r} the value {str(value)[:40]}")
        try:
            re.compile(pattern)
            compiled.append((re.compile(rf"(?:.*\.)?(?:{pattern})$"), value))
        except (re.error, RecursionError):
            raise ConfigInvalid(f"{name} has the key {pattern[:80]!r}: no pattern") from None
    return tuple(compiled)


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
        del asked["modules_to_save"]  # its tensors can be taken away; the others' meaning cannot
    for name, value in asked.items():
        if value:
            raise Unscorable(f"adapter_config.json sets {name} to {str(value)[:80]}")


def _matching(patterns: Patterns[T], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
