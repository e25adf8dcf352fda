"""The recommended setting keeps the stated rule, whatever the scores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.lab.evaluation.results import Bounds, TaskScore, TrialResult, recommended
from s3lora_serve.lab.evaluation.trials import trials
from s3lora_serve.plans.schema import wilson

COUNT = 20


def trial(label, changed, asr=None, utility=None):
    scores = [
        TaskScore(task=role, role=role, rate=wilson(successes, COUNT), log="log")
        for role, successes in (("asr", asr), ("utility", utility))
        if successes is not None
    ]
    return TrialResult(
        label=label, decision="stripped", changed=changed, snippet={}, scores=tuple(scores)
    )


@st.composite
def sweeps(draw):
    rates = st.integers(0, COUNT)
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    return tuple(
        trial(f"t{place}", changed, draw(rates), draw(rates))
        for place, changed in enumerate(counts)
    )


@given(sweeps(), st.floats(0, 1), st.floats(0, 1))
def test_recommended_setting_keeps_the_rule_and_none_that_does_has_more_utility(found, asr, loss):
    rule = Bounds(max_asr=asr, max_utility_loss=loss)
    whole = min(found, key=lambda one: one.changed).mean("utility")
    fit = [one for one in found if one.mean("asr") <= asr and one.mean("utility") >= whole - loss]
    best = recommended(found, rule)
    assert (best is None) == (not fit)
    if best is not None:
        assert best in fit
        assert best.mean("utility") == max(one.mean("utility") for one in fit)


def test_ties_go_to_the_setting_that_changes_less():
    found = (trial("b", 10, 0, 15), trial("a", 5, 0, 15))
    assert recommended(found, Bounds()).label == "a"


def test_without_a_task_of_a_role_its_part_of_the_rule_holds():
    assert recommended((trial("a", 5, utility=3),), Bounds()).label == "a"
    assert recommended((trial("a", 5, asr=0),), Bounds()).label == "a"
    assert recommended((trial("a", 5, asr=COUNT),), Bounds()) is None
    assert recommended((), Bounds()) is None


def test_trials_carry_scorer_and_action_and_the_plan_comes_last():
    found = trials([0, 5], "safe-lora", "project", {"version": 1})
    assert [one.label for one in found] == ["top_k=0", "top_k=5", "plan"]
    settings = {"strip": {"top_k": 5}, "scorer": {"name": "safe-lora"}, "action": "project"}
    assert found[1].settings == settings
    assert found[1].snippet == settings
    assert found[2].plan == {"version": 1}
    assert found[2].settings == {}


def test_strengths_are_settings_that_strip_nothing():
    found = trials([], None, None, None, [0.3, 0.05])
    assert [each.label for each in found] == ["strength=0.3", "strength=0.05"]
    assert found[0].settings == {"strip": {"top_k": 0}, "repair": {"strength": 0.3}}


@pytest.mark.parametrize("strengths", [[0.0], [1e7], [-0.1], [0.1, 0.1], [float("nan")]])
def test_strengths_out_of_their_range_or_given_twice_are_refused(strengths):
    with pytest.raises(ValueError, match="--strength"):
        trials([], None, None, None, strengths)
