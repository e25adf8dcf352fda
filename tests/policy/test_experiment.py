"""Experiments change only what the policy allows, under names that nothing else can take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import ExperimentClosed, NameReserved, PolicyInvalid
from s3lora_serve.policy.experiment import Settings, check_name, experiment_policy
from s3lora_serve.policy.schema import Policy, parse_policy

OPEN = {"experiments": {"names": "eval/*", "allow": ["strip", "scorer", "plan"]}}


def policy(**keys):
    return parse_policy(OPEN | keys, "policy")


def test_there_are_no_experiments_unless_the_policy_opens_them():
    with pytest.raises(ExperimentClosed):
        check_name(Policy(), "eval/a", is_experiment=True)
    check_name(Policy(), "eval/a", is_experiment=False)
    with pytest.raises(ExperimentClosed, match="strip"):
        experiment_policy(
            parse_policy({"experiments": {}}, "p"), Settings(strip={"top_k": 1}), with_plan=False
        )


@pytest.mark.parametrize(("name", "kept"), [("eval/a", True), ("a", False), ("eval/a/b", False)])
def test_names_for_experiments_are_theirs_alone(name, kept):
    check_name(policy(), name, is_experiment=kept)
    with pytest.raises(NameReserved):
        check_name(policy(), name, is_experiment=not kept)


def test_settings_replace_the_policys_and_nothing_else_does():
    own = policy(deny=["sha256:" + "0" * 64], limits={"max_rank": 8})
    changed = experiment_policy(own, Settings(strip={"threshold": 0.5}), with_plan=False)
    assert changed.strip.rule == ("threshold", 0.5)
    assert changed.limits == own.limits
    assert changed.deny == own.deny
    assert changed.digest != own.digest


def test_rules_and_plans_of_the_policy_do_not_undo_the_settings(tmp_path):
    own = policy(
        plans=str(tmp_path), require_plan=True, rules=[{"match": {}, "strip": {"top_k": 9}}]
    )
    changed = experiment_policy(own, Settings(strip={"top_k": 1}), with_plan=False)
    assert changed.rules == ()
    assert changed.plans is None
    assert not changed.require_plan


@pytest.mark.parametrize("plan", [True, False])
def test_a_plan_must_be_allowed(plan):
    own = parse_policy({"experiments": {"allow": ["strip"]}}, "p")
    if plan:
        with pytest.raises(ExperimentClosed, match="plan"):
            experiment_policy(own, Settings(), with_plan=True)
    else:
        assert experiment_policy(own, Settings(), with_plan=False).strip == own.strip


def test_scorer_that_needs_a_reference_takes_the_policys_or_is_refused():
    with pytest.raises(PolicyInvalid, match="needs reference"):
        experiment_policy(policy(), Settings(scorer={"name": "splora"}), with_plan=False)
    own = policy(scorer={"reference": "r"})
    changed = experiment_policy(own, Settings(scorer={"name": "splora"}), with_plan=False)
    assert str(changed.scorer.reference) == "r"


@pytest.mark.parametrize(
    "body",
    [
        {"limits": {"max_rank": 512}}, {"deny": []}, {"mode": "audit"}, {"rules": []},
        {"scorer": {"name": "svd"}}, {"scorer": {"name": "splora", "reference": "/etc/passwd"}},
        {"strip": {"top_k": -1}}, {"strip": {}}, {"action": "drop"},
    ],
)  # fmt: skip
def test_settings_cannot_be_anything_else(body):
    with pytest.raises(ValueError, match="validation error"):
        Settings.model_validate(body)


def test_no_rule_may_open_experiments():
    with pytest.raises(PolicyInvalid, match="experiments"):
        parse_policy({"rules": [{"match": {}, "experiments": {"allow": ["strip"]}}]}, "p")


@given(st.text(max_size=20))
def test_every_name_is_for_experiments_or_for_adapters(name):
    kept = policy().experiments.claims(name)
    check_name(policy(), name, is_experiment=kept)
    with pytest.raises(NameReserved):
        check_name(policy(), name, is_experiment=not kept)
