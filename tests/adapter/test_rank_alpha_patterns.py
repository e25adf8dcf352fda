"""rank_pattern and alpha_pattern match as in PEFT and vLLM, for any number of keys."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from vllm.lora.peft_helper import PEFTHelper

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.adapter.rank_alpha_patterns import MAX_FORMS, ModulePatterns
from s3lora_serve.errors import ConfigInvalid
from s3lora_serve.vllm_plugin.engine.rank_alpha_matching import PatternMatching
from tests.support.adapters import copy_with

# Few letters and many dots, so that keys often match and share forms.
NAMES = st.text("ab.", min_size=1, max_size=6) | st.text("ab1._-", min_size=1, max_size=14)
KEYS = NAMES | st.text(r"ab.|^$\*+", min_size=1, max_size=6)


def reference(keys, name):
    """The index of the first key that vLLM and PEFT match, or None."""
    found = [re.match(rf"(.*\.)?({key})$", name) is not None for key in keys]
    return found.index(True) if any(found) else None


@given(keys=st.lists(KEYS, unique=True, max_size=12), name=NAMES)
def test_the_first_key_that_peft_would_match_wins(keys, name):
    values = {key: i for i, key in enumerate(keys)}
    try:
        patterns = ModulePatterns("rank_pattern", values)
    except ConfigInvalid:
        return
    expected = reference(keys, name)
    assert patterns.get(name) == expected
    assert PEFTHelper._match_pattern(values, name) == expected, "vLLM's own matching differs"
    key = get_pattern_key(keys, name)
    assert key == (name if expected is None else keys[expected]), "PEFT's own matching differs"
    assert PatternMatching().first_value(values, name) == expected, "a worker's matching differs"


@given(maps=st.lists(st.dictionaries(NAMES, st.integers(1, 9), max_size=3), max_size=30))
def test_a_worker_never_takes_one_adapters_map_for_anothers(maps):
    matching = PatternMatching()
    for each in (*maps, *maps):
        for name in ("a.b", "ab", "b"):
            assert matching.first_value(dict(each), name) == ModulePatterns("", each).get(name)


def test_an_adapter_of_1000_experts_with_a_key_for_each_projection_is_read(trained, tmp_path):
    keys = {
        f"layers.{layer}.mlp.experts.{expert}.{projection}"
        for layer in range(3) for expert in range(1000) for projection in ("up_proj", "down_proj")
    }  # fmt: skip
    own = {"layers.1.self_attn.q_proj": 32.0}
    folder = copy_with(trained, tmp_path / "many", alpha_pattern=dict.fromkeys(keys, 8.0) | own)
    verdict = scan_adapter(folder, Policy())
    assert verdict.reason is None
    assert len(verdict.modules) == 28
    before = scan_adapter(trained, Policy()).modules
    changed = {
        m.name for m, old in zip(verdict.modules, before, strict=True)
        if not math.isclose(m.row_norm_mean, old.row_norm_mean)
    }  # fmt: skip
    assert changed == {"model.layers.1.self_attn.q_proj"}


def test_keys_with_too_many_forms_are_refused_by_name():
    names = {f"{'a' * i}.{'b' * j}": 8 for i in range(20) for j in range(20)}
    ModulePatterns("rank_pattern", names | {f"{'a' * i}.{'c' * i}": 8 for i in range(20)})
    for one_more in ("a.b.c", "a$"):
        with pytest.raises(ConfigInvalid, match=rf"rank_pattern .*{MAX_FORMS} forms"):
            ModulePatterns("rank_pattern", names | {one_more: 8})
