"""rank_pattern and alpha_pattern in workers: looked up once a module.

vLLM tries every key on every module, and compiles anew what Python's cache of 512 expressions does
not hold: minutes for an adapter with a key for each of 1,000 experts.
"""

from typing import Any

from s3lora_serve.adapter import Adapter
from s3lora_serve.errors import DoesNotFitModel
from s3lora_serve.module_patterns import MAX_FORMS, ModulePatterns
from s3lora_serve.vllm_plugin import compat, contract, patches

MOST_MAPS = 8
"""Maps kept: two of each adapter that is being loaded."""


class PatternMatching:
    """Finds values as PEFT and vLLM do; kept by the identity of vLLM's own map."""

    def __init__(self) -> None:
        self._maps: dict[int, tuple[dict[str, Any], ModulePatterns[Any]]] = {}

    def first_value(self, pattern: dict[str, Any], name: str) -> Any:
        """The value of the first key that matches a module, in the place of vLLM's own search."""
        kept = self._maps.get(id(pattern))
        if kept is None or kept[0] is not pattern:
            kept = pattern, ModulePatterns("adapter_config.json", pattern)
            others = list(self._maps.items())[1 - MOST_MAPS :]
            self._maps = dict(others) | {id(pattern): kept}
        return kept[1].get(name)


def match_patterns() -> None:
    """Have this process match patterns fast, if its vLLM matches any."""
    if contract.matches_patterns():
        patches.replace_match_pattern(PatternMatching().first_value)


def check_patterns(adapter: Adapter) -> None:
    """Refuse more keys than a vLLM takes that is not known to match them here.

    Raises:
        DoesNotFitModel: it would try each key on each module.
    """
    keys = len(adapter.config.ranks) + len(adapter.config.alphas)
    if keys > MAX_FORMS and not contract.matches_patterns():
        raise DoesNotFitModel(
            f"rank_pattern and alpha_pattern have {keys} keys, over the {MAX_FORMS} that"
            f" vLLM {compat.installed_version()} can match in time"
        )
