"""The strip rule counts only modules whose update is not negligible."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.admission.decision import decide
from s3lora_serve.admission.strip_rules import energy_shares, negligible_modules
from s3lora_serve.admission.verdict import Decision
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy
from s3lora_serve.spectral import ModuleScore

DIGEST = "sha256:" + "0" * 64
SHARE = Policy().negligible


def score(name, relative, norm=1.0, ssi=None):
    index = relative if ssi is None else ssi
    return ModuleScore(name, True, index, relative, (1.0,), 1.0, 1.0, norm, 1.0)


def decide_by(found, **policy):
    return decide(found, {}, DIGEST, Policy(**policy))


def planted(count=28):
    """One sharp module among modules of low SSI."""
    return [score(f"m{i:02}", 0.1 + i / 1000) for i in range(count - 1)] + [score("planted", 0.6)]


RULES = [{"top_k": 10}, {"fraction": 0.1}, {"threshold": 0.5}, {"outliers": 3.5}]
CHOICES = st.one_of(
    st.builds(lambda v: Strip(top_k=v), st.integers(0, 12)),
    st.builds(lambda v: Strip(fraction=v), st.floats(0, 1)),
    st.builds(lambda v: Strip(threshold=v), st.floats(0, 1)),
    st.builds(lambda v: Strip(outliers=v), st.floats(0.01, 10)),
)
RELATIVES = st.none() | st.floats(0, 1)
POLICIES = st.builds(
    lambda choice, most, blind: Policy(
        strip=choice, limits=Limits(max_stripped_fraction=most), on_uninformative=blind
    ),
    CHOICES, st.floats(0, 1), st.sampled_from(["reject", "admit"]),
)  # fmt: skip
MODULES = st.lists(
    st.tuples(RELATIVES, st.floats(1e-3, 1.0)), min_size=1, max_size=24
).map(lambda facts: [score(f"m{i:02}", *fact) for i, fact in enumerate(facts)])  # fmt: skip


@st.composite
def decoys(draw):
    """Any number of modules of any sharpness, each negligible beside any of MODULES."""
    facts = draw(st.lists(st.tuples(RELATIVES, st.floats(0, 0.99)), max_size=24))
    # The smallest norm in MODULES is 1e-3; beside one such module alone these are negligible.
    bound = 1e-3 * math.sqrt(SHARE)
    return [score(f"d{i:02}", relative, part * bound) for i, (relative, part) in enumerate(facts)]


@pytest.mark.parametrize("choice", RULES, ids=str)
def test_decoys_at_a_ten_thousandth_of_their_size_do_not_use_up_the_strips(choice):
    found = planted()
    changed = [score(s.name, 0.99, norm=1e-4) if i < 12 else s for i, s in enumerate(found)]
    outcome = decide_by(changed, strip=Strip(**choice))
    assert outcome.decision is Decision.STRIPPED
    assert "planted" in outcome.stripped
    # Decoys as sharp as the stripped modules are stripped too, but not counted.
    assert {s.name for s in changed[:12]} <= outcome.stripped


@given(found=MODULES, small=decoys(), policy=POLICIES)
def test_no_set_of_negligible_modules_changes_the_outcome_of_the_others(found, small, policy):
    names = {s.name for s in found}
    assert negligible_modules([*found, *small], SHARE) - {s.name for s in small} == (
        negligible_modules(found, SHARE)
    )
    counted = names - negligible_modules(found, SHARE)
    alone, beside = (decide(scores, {}, DIGEST, policy) for scores in (found, [*found, *small]))
    assert beside.stripped & counted == alone.stripped & counted
    assert (beside.decision is Decision.REJECTED) == (alone.decision is Decision.REJECTED)
    assert type(beside.refusal) is type(alone.refusal)
    assert beside.uninformative == alone.uninformative


@given(found=MODULES, huge=st.lists(RELATIVES, min_size=1, max_size=4), policy=POLICIES)
def test_no_module_is_exempt_for_being_small_beside_inflated_ones(found, huge, policy):
    """Unless the adapter is rejected, all that the rule strips at equal norms is stripped."""
    inflated = [score(f"h{i}", relative, 1e9) for i, relative in enumerate(huge)]
    scores = [*found, *inflated]
    sized = decide(scores, {}, DIGEST, policy)
    blind = decide([score(s.name, s.relative_ssi, ssi=s.ssi) for s in scores], {}, DIGEST, policy)
    if Decision.REJECTED not in (sized.decision, blind.decision):
        assert blind.stripped - {s.name for s in inflated} <= sized.stripped


@given(found=MODULES, small=decoys(), policy=POLICIES)
def test_negligible_modules_as_sharp_as_the_last_one_picked_are_stripped_too(found, small, policy):
    outcome = decide([*found, *small], {}, DIGEST, policy)
    index = {s.name: s.relative_ssi for s in [*found, *small]}
    picked = outcome.stripped - {s.name for s in small}
    if policy.strip.rule[0] in ("top_k", "fraction") and picked:
        last = min(index[name] for name in picked)
        for s in small:
            if s.relative_ssi is not None and s.relative_ssi > last + 1e-8:
                assert s.name in outcome.stripped


@given(norms=st.lists(st.floats(0, 1e30), max_size=30), share=st.floats(0, 0.5))
def test_what_counts_is_decided_by_larger_modules_alone(norms, share):
    scores = [score(f"m{i:02}", 0.5, norm) for i, norm in enumerate(norms)]
    small = negligible_modules(scores, share)
    counted = [s.frobenius_norm for s in scores if s.name not in small]
    assert all(norm > 0 for norm in counted)
    if small and counted:
        largest = max(s.frobenius_norm for s in scores if s.name in small)
        assert largest <= min(counted)
        # A square that underflows relative to the largest one is zero.
        bound = max(share * (1 + 1e-9), sys.float_info.min)
        assert largest**2 <= bound * sum(norm**2 for norm in counted)
    assert math.isclose(sum(energy_shares(scores)), 1.0) or not any(norms)


def test_updates_of_zero_neither_count_nor_raise_the_cap():
    found = [score(f"m{i}", 0.1 * i) for i in range(6)]
    zeros = [score(f"z{i}", None, norm=0.0) for i in range(20)]
    for choice in ({"top_k": 10}, {"fraction": 0.5}):
        assert len(decide_by([*found, *zeros], strip=Strip(**choice)).stripped) == 3
    outcome = decide_by([*found, *zeros], strip=Strip(threshold=0.2))
    assert outcome.decision is Decision.REJECTED, "four of six are sharp, not four of twenty-six"


@pytest.mark.parametrize("norm", [230.0, 1e6])
def test_one_inflated_module_leaves_nothing_to_rank_and_is_refused(norm):
    found = [*planted()[:-1], score("inflated", 0.05, norm)]
    assert decide_by(found).refusal.code == "S3LORA-205"


def test_modules_beside_one_200_times_as_large_are_ranked():
    found = [*planted()[:-1], score("inflated", 0.6, norm=200.0)]
    assert "inflated" in decide_by(found, strip=Strip(top_k=1)).stripped


def test_limit_an_inflated_sharp_module_is_admitted_where_the_policy_admits_what_has_no_rank():
    found = [*planted()[:-1], score("inflated", 0.6, norm=230.0)]
    assert "inflated" not in decide_by(found, on_uninformative="admit").stripped


def test_the_negligible_share_is_the_policys():
    found = [score("a", 0.2), score("b", 0.3), score("c", 0.9, norm=0.1)]
    assert decide_by(found, strip=Strip(top_k=1)).stripped == {"c"}
    moved = decide_by(found, strip=Strip(top_k=1), negligible=0.01)
    assert moved.stripped == {"b", "c"}
