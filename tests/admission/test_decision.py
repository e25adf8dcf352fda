"""The admission decision depends on the scores and the policy alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.admission.decision import decide
from s3lora_serve.admission.verdict import Decision
from s3lora_serve.errors import (
    Denied,
    NegativeAlpha,
    OverLimit,
    TooManySharp,
    Uninformative,
    Unrankable,
)
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy
from s3lora_serve.spectral import ModuleScore

DIGEST = "sha256:" + "0" * 64
CONFIG = "sha256:" + "1" * 64
LISTED = {"digest": DIGEST, "config_digest": CONFIG}


def score(name, relative, ssi=None, norm=1.0):
    index = relative if ssi is None else ssi
    return ModuleScore(name, True, index, relative, (1.0,), 1.0, 1.0, norm, 1.0)


def scores(*relatives):
    return [score(f"m{i:02}", relative) for i, relative in enumerate(relatives)]


def decide_by(found, scaling=None, **policy):
    return decide(found, scaling or {}, DIGEST, Policy(**policy), config_digest=CONFIG)


def strip(found, half=1.0, **choice):
    limits = Limits(max_stripped_fraction=half)
    return decide_by(found, strip=Strip(**choice), limits=limits)


def test_top_k_takes_the_sharpest():
    assert strip(scores(0.1, 0.9, 0.2, 0.8), top_k=2).stripped == {"m01", "m03"}


def test_ties_are_broken_by_name_after_rounding():
    found = scores(0.5, 0.5 + 1e-12, 0.1, 0.5)
    assert strip(found, top_k=2).stripped == {"m00", "m01"}


def test_top_k_and_fraction_stop_at_the_largest_share_rounded_down():
    found = scores(*(i / 10 for i in range(7)))
    assert len(strip(found, half=0.5, top_k=10).stripped) == 3
    assert len(strip(found, half=0.5, fraction=0.9).stripped) == 3
    assert len(strip(found, fraction=0.3).stripped) == 2


def test_fraction_tolerates_rounding_of_the_last_bit():
    found = scores(*(i / 100 for i in range(100)))
    assert len(strip(found, fraction=0.29).stripped) == 29


def test_threshold_compares_the_index_itself_and_includes_it():
    found = [score("a", 0.0, 0.3), score("b", 0.9, 0.29), score("c", 0.5, 0.31)]
    assert strip(found, threshold=0.3).stripped == {"a", "c"}


@pytest.mark.parametrize("choice", [{"threshold": 0.5}, {"outliers": 0.1}])
def test_threshold_and_outliers_beyond_the_share_reject(choice):
    found = scores(0.1, 0.6, 0.7, 0.8, 0.9)
    outcome = strip(found, half=0.3, **choice)
    assert outcome.decision is Decision.REJECTED
    assert isinstance(outcome.refusal, TooManySharp)
    assert not outcome.stripped


def test_outliers_takes_only_those_above():
    found = scores(0.20, 0.21, 0.19, 0.22, 0.18, 0.9, 0.0)
    assert strip(found, outliers=3.5).stripped == {"m05"}


def test_outliers_works_where_most_modules_agree():
    assert strip(scores(*[0.2] * 9, 0.9), outliers=2.0).stripped == {"m09"}


def test_nothing_sharp_admits():
    outcome = strip(scores(0.1, 0.2), threshold=0.9)
    assert outcome.decision is Decision.ADMITTED
    assert outcome.refusal is None


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"fraction": 0.5}, {"outliers": 3.5}])
def test_equal_indices_are_uninformative_and_no_module_is_picked(choice):
    found = scores(0.2, 0.2005, 0.2009)
    outcome = strip(found, **choice)
    assert isinstance(outcome.refusal, Uninformative)
    assert outcome.uninformative
    admitted = decide_by(found, strip=Strip(**choice), on_uninformative="admit")
    assert (admitted.decision, admitted.stripped) == (Decision.ADMITTED, frozenset())
    assert admitted.uninformative


@pytest.mark.parametrize("found", [scores(0.5), [score("a", None, 1.0), score("b", None, 1.0)]])
def test_one_module_or_rank_one_throughout_is_unrankable(found):
    outcome = decide_by(found)
    assert isinstance(outcome.refusal, Unrankable)
    assert not outcome.uninformative
    assert decide_by(found, on_uninformative="admit").decision is Decision.ADMITTED


def test_modules_without_relative_index_are_never_ranked():
    found = [*scores(0.1, 0.2, 0.3), score("zero", None), score("rank_one", None, 1.0)]
    assert strip(found, top_k=5).stripped == {"m00", "m01", "m02"}


def test_denied_digest_is_refused_and_allowed_adapter_is_admitted_whole():
    found = scores(0.1, 0.9)
    assert isinstance(decide_by(found, deny=[DIGEST], allow=[LISTED]).refusal, Denied)
    allowed = decide_by(found, allow=[LISTED])
    assert (allowed.decision, allowed.stripped) == (Decision.ADMITTED, frozenset())


@pytest.mark.parametrize("other", [{"digest": CONFIG}, {"config_digest": DIGEST}])
def test_allowed_weights_with_another_configuration_are_decided_as_any_others(other):
    found = scores(0.1, 0.9)
    assert decide_by(found, allow=[LISTED | other]) == decide_by(found)


def test_allowed_adapter_is_still_bound_by_the_scaling_limit():
    outcome = decide_by(scores(0.1, 0.9), {"m00": 1e9}, allow=[LISTED])
    assert isinstance(outcome.refusal, OverLimit)


def test_negative_alpha_is_refused_unless_the_adapter_or_the_limit_is_allowed():
    found, scaling = scores(0.1, 0.9), {"m00": 2.0, "m01": -2.0}
    refusal = decide_by(found, scaling).refusal
    assert isinstance(refusal, NegativeAlpha)
    assert "m01 has scaling -2" in str(refusal)
    assert decide_by(found, scaling, allow=[LISTED]).refusal is None
    assert decide_by(found, scaling, limits=Limits(negative_alpha=True)).refusal is None
    assert decide_by(found, {"m00": 0.0, "m01": -0.0}).refusal is None


@pytest.mark.parametrize("value", [65.0, -65.0, float("nan"), float("inf")])
def test_scaling_over_the_limit_is_refused(value):
    outcome = decide_by(scores(0.1, 0.9), {"m00": 1.0, "m01": value})
    assert isinstance(outcome.refusal, OverLimit)
    assert "m01" in str(outcome.refusal)


def test_norm_over_the_ratio_is_refused():
    found = [score("a", 0.1), score("b", 0.2), score("c", 0.9, norm=11.0)]
    outcome = decide_by(found, limits=Limits(max_norm_ratio=10.0))
    assert isinstance(outcome.refusal, OverLimit)
    assert decide_by(found, limits=Limits(max_norm_ratio=12.0)).refusal is None


CHOICES = st.one_of(
    st.builds(lambda v: Strip(top_k=v), st.integers(0, 20)),
    st.builds(lambda v: Strip(fraction=v), st.floats(0, 1)),
    st.builds(lambda v: Strip(threshold=v), st.floats(0, 1)),
    st.builds(lambda v: Strip(outliers=v), st.floats(0.01, 10)),
)


@given(
    relatives=st.lists(st.none() | st.floats(0, 1), max_size=30),
    choice=CHOICES,
    most=st.floats(0, 1),
    seed=st.randoms(use_true_random=False),
)
def test_any_scores_and_policy_give_one_consistent_outcome(relatives, choice, most, seed):
    found = scores(*relatives)
    policy = {"strip": choice, "limits": Limits(max_stripped_fraction=most)}
    outcome = decide_by(found, **policy)
    assert (outcome.decision is Decision.REJECTED) == (outcome.refusal is not None)
    assert (outcome.decision is Decision.STRIPPED) == bool(outcome.stripped)
    assert len(outcome.stripped) <= most * len(found) + 1e-6
    assert outcome.stripped <= {s.name for s in found if s.ssi is not None}
    seed.shuffle(found)
    shuffled = decide_by(found, **policy)
    assert (shuffled.decision, shuffled.stripped) == (outcome.decision, outcome.stripped)
