"""rank_pattern and alpha_pattern match as in PEFT and vLLM, for any number of keys."""

import math
import re
import time

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
ATOMS = st.sampled_from(("a", "b", ".", r"\.", "[ab]", "[^a]", "[a-b1_]", r"\d", r"\w", "^", "$"))
REPEATED = st.tuples(ATOMS, st.sampled_from(("", "*", "+", "?", "*?", "{2}", "{1,3}"))).map("".join)
EXPRESSIONS = st.recursive(
    REPEATED,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | st.tuples(inner, st.sampled_from(("(?:{})*", "(?:{})?", "(?P<x>{})", "(?i:{})"))).map(
            lambda pair: pair[1].replace("{}", pair[0])
        )
    ),
    max_leaves=4,  # Python's engine needs exponential time for more
)
KEYS = NAMES | st.text(r"ab.|^$\*+", min_size=1, max_size=6) | EXPRESSIONS
WRITTEN = (
    r".*\.layers\.3\..*(q_proj|k_proj|v_proj|o_proj)$",
    r"model\.layers\.[01]\.self_attn\.q_proj",
    r"^model\.layers\.(?:[0-9]|1[0-5])\..*\.(?:up|down)_proj",
    r"layers\.(0|1|2|3|4|5|6|7|8|9|10|11|12)\.mlp\.(gate|up|down)_proj",
    r".*self_attn\.(?!q).*",
)
"""As PEFT's documents and users write them; the last one looks ahead."""


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


@given(key=EXPRESSIONS, name=NAMES)
def test_expressions_that_peft_takes_match_as_they_do_there(key, name):
    try:
        expected = reference([key], name)
    except re.error:
        with pytest.raises(ConfigInvalid, match="no expression"):
            ModulePatterns("rank_pattern", {key: 0})
        return
    assert ModulePatterns("rank_pattern", {key: 0}).get(name) == expected


@pytest.mark.parametrize("key", WRITTEN[:-1])
def test_expressions_that_people_write_match_as_in_peft(key):
    for layer in (0, 1, 3, 12, 15, 16):
        for projection in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"):
            name = f"model.layers.{layer}.{projection}"
            expected = 4 if get_pattern_key([key], name) == key else None
            assert ModulePatterns("rank_pattern", {key: 4}).get(name) == expected


@pytest.mark.parametrize(
    "key", [WRITTEN[-1], r"(a)\1", "a{,2}", "[[:alpha:]]", "((a{99}){99}){99}", "(?i:ſ)", "a*+"]
)
def test_what_cannot_be_matched_in_bounded_time_is_refused_and_says_the_cure(key):
    with pytest.raises(ConfigInvalid, match="bounded time: write it without lookarounds"):
        ModulePatterns("rank_pattern", {key: 8})


def test_a_hostile_expression_takes_no_time():
    name = "a" * 200 + "b"
    started = time.thread_time()
    assert ModulePatterns("rank_pattern", {r"(a|a|a*)*(a*)*c": 1}).get(name) is None
    assert time.thread_time() - started < 1  # minutes by backtracking


def test_an_adapter_with_expressions_for_layers_is_scored_with_the_values_they_give(
    trained, tmp_path
):
    pattern = {r".*\.layers\.3\..*(q_proj|k_proj)$": 64.0}
    folder = copy_with(trained, tmp_path / "expression", alpha_pattern=pattern)
    before = scan_adapter(trained, Policy()).modules
    verdict = scan_adapter(folder, Policy())
    assert verdict.reason is None
    changed = [
        m.name for m, old in zip(verdict.modules, before, strict=True)
        if not math.isclose(m.row_norm_mean, old.row_norm_mean)
    ]  # fmt: skip
    assert changed == [f"model.layers.3.self_attn.{side}_proj" for side in "kq"]
