"""rank_pattern and alpha_pattern in workers, by one lookup for each module.

vLLM tries every key on every module and compiles expressions again that Python's cache of 512 has
dropped. That takes minutes for an adapter with a key for each of 1,000 experts.
"""

from typing import Any

from s3lora_serve.adapter.rank_alpha_patterns import MAX_FORMS, ModulePatterns
from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.errors import DoesNotFitModel
from s3lora_serve.vllm_plugin import compat, contract, patches

MAX_MAPS = 8
"""Parsed maps kept: two for each adapter that is being loaded."""


class PatternMatching:
    """Finds values as PEFT and vLLM do. Parsed maps are kept by the identity of vLLM's own map."""

    def __init__(self) -> None:
        self._maps: dict[int, tuple[dict[str, Any], ModulePatterns[Any]]] = {}

    def first_value(self, pattern: dict[str, Any], name: str) -> Any:
        """The value of the first key that matches a module; replaces vLLM's own search."""
        kept = self._maps.get(id(pattern))
        if kept is None or kept[0] is not pattern:
            kept = pattern, ModulePatterns("adapter_config.json", pattern)
            others = list(self._maps.items())[1 - MAX_MAPS :]
            self._maps = dict(others) | {id(pattern): kept}
        return kept[1].get(name)


def match_patterns() -> None:
    """Replace vLLM's pattern search in this process, if its version has one."""
    if contract.matches_patterns():
        patches.replace_match_pattern(PatternMatching().first_value)


def check_patterns(adapter: Adapter) -> None:
    """Check the number of keys where vLLM's own pattern search is in use.

    Raises:
        DoesNotFitModel: more keys than vLLM can try on each module in time.
    """
    keys = len(adapter.config.ranks) + len(adapter.config.alphas)
    if keys > MAX_FORMS and not contract.matches_patterns():
        raise DoesNotFitModel(
            f"rank_pattern and alpha_pattern have {keys} keys, over the {MAX_FORMS} that"
            f" vLLM {compat.installed_version()} can match in time"
        )
