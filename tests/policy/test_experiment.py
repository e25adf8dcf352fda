"""Experiments change only what the policy allows, under names that nothing else can take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import ExperimentClosed, NameReserved, PolicyInvalid
from s3lora_serve.policy.experiment import ExperimentSettings, check_name, experiment_policy
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
            parse_policy({"experiments": {}}, "p"),
            ExperimentSettings(strip={"top_k": 1}),
            with_plan=False,
        )


@pytest.mark.parametrize(("name", "kept"), [("eval/a", True), ("a", False), ("eval/a/b", False)])
def test_names_for_experiments_are_theirs_alone(name, kept):
    check_name(policy(), name, is_experiment=kept)
    with pytest.raises(NameReserved):
        check_name(policy(), name, is_experiment=not kept)


def test_settings_replace_the_policys_and_nothing_else_does():
    own = policy(deny=["sha256:" + "0" * 64], limits={"max_rank": 8})
    changed = experiment_policy(own, ExperimentSettings(strip={"threshold": 0.5}), with_plan=False)
    assert changed.strip.rule == ("threshold", 0.5)
    assert changed.limits == own.limits
    assert changed.deny == own.deny
    assert changed.digest != own.digest


def test_rules_of_the_policy_do_not_undo_the_settings():
    own = policy(rules=[{"match": {}, "strip": {"top_k": 9}}])
    changed = experiment_policy(own, ExperimentSettings(strip={"top_k": 1}), with_plan=False)
    assert changed.rules == ()
    assert changed.strip.rule == ("top_k", 1)


@pytest.mark.parametrize("allow", [[], ["strip", "scorer", "action"]])
def test_plans_stay_used_and_required_unless_the_policy_opens_them(tmp_path, allow):
    own = parse_policy(
        {"experiments": {"allow": allow}, "plans": str(tmp_path), "require_plan": True}, "p"
    )
    kept = experiment_policy(own, ExperimentSettings(), with_plan=False)
    assert (kept.plans, kept.require_plan) == (tmp_path, True)
    opened = parse_policy(own.as_json() | {"experiments": {"allow": ["plan"]}}, "p")
    without = experiment_policy(opened, ExperimentSettings(), with_plan=False)
    assert (without.plans, without.require_plan) == (None, False)


OPENED = {"strip": {"strip"}, "scorer": {"scorer"}, "action": {"action"},
          "plan": {"plans", "require_plan"}}  # fmt: skip


@given(allow=st.sets(st.sampled_from(sorted(OPENED))), data=st.data())
def test_an_experiment_changes_nothing_that_the_policy_does_not_open(allow, data):
    keys = {
        "experiments": {"allow": sorted(allow), "ttl": 60}, "plans": "/plans", "require_plan": True,
        "scorer": {"reference": "/r"}, "limits": {"max_rank": 8, "roots": ["/adapters"]},
        "signatures": {"require": True, "keys": ["/key.pem"]}, "on_unscorable": "strip",
        "attestations": {"require": True, "keys": ["/key.pem"], "max_age": 60},
    }  # fmt: skip
    own = parse_policy(keys, "p")
    asked = {"strip": {"top_k": 1}, "scorer": {"name": "safe-lora"}, "action": "strip"}
    chosen = data.draw(st.sets(st.sampled_from(sorted(asked))))
    with_plan = data.draw(st.booleans())
    settings = ExperimentSettings(**{key: asked[key] for key in chosen})
    if (chosen | ({"plan"} if with_plan else set())) - allow:
        with pytest.raises(ExperimentClosed):
            experiment_policy(own, settings, with_plan=with_plan)
        return
    changed = experiment_policy(own, settings, with_plan=with_plan)
    before, after = own.as_json(), changed.as_json()
    differing = {key for key in before if before[key] != after[key]}
    assert differing <= set().union(*(OPENED[key] for key in allow)) | {"attestations"}
    # An attestation is asked for as the policy asks for it: of what decides there, no other.
    asked_for = before["attestations"] | {"policy_digest": own.deciding_digest}
    assert after["attestations"] == asked_for


def test_an_experiments_attestation_is_one_that_the_policy_itself_would_take():
    for wanted in ("any", "sha256:" + "1" * 64):
        own = policy(attestations={"policy_digest": wanted})
        changed = experiment_policy(own, ExperimentSettings(strip={"top_k": 1}), with_plan=False)
        assert changed.attestations.policy_digest == wanted


@pytest.mark.parametrize("ttl", [0, -1, "nan", "x"])
def test_a_time_to_live_is_a_positive_number_of_seconds(ttl):
    with pytest.raises(PolicyInvalid, match="ttl"):
        policy(experiments={"ttl": ttl})


@pytest.mark.parametrize("plan", [True, False])
def test_a_plan_must_be_allowed(plan):
    own = parse_policy({"experiments": {"allow": ["strip"]}}, "p")
    if plan:
        with pytest.raises(ExperimentClosed, match="plan"):
            experiment_policy(own, ExperimentSettings(), with_plan=True)
    else:
        assert experiment_policy(own, ExperimentSettings(), with_plan=False).strip == own.strip


def test_scorer_that_needs_a_reference_takes_the_policys_or_is_refused():
    with pytest.raises(PolicyInvalid, match="needs reference"):
        experiment_policy(policy(), ExperimentSettings(scorer={"name": "splora"}), with_plan=False)
    own = policy(scorer={"reference": "r"})
    changed = experiment_policy(own, ExperimentSettings(scorer={"name": "splora"}), with_plan=False)
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
        ExperimentSettings.model_validate(body)


def test_no_rule_may_open_experiments():
    with pytest.raises(PolicyInvalid, match="experiments"):
        parse_policy({"rules": [{"match": {}, "experiments": {"allow": ["strip"]}}]}, "p")


@given(st.text(max_size=20))
def test_every_name_is_for_experiments_or_for_adapters(name):
    kept = policy().experiments.claims(name)
    check_name(policy(), name, is_experiment=kept)
    with pytest.raises(NameReserved):
        check_name(policy(), name, is_experiment=not kept)


REPAIRING = {
    "repair": {"statistics": "/base.statistics", "max_effect": 0.1},
    "experiments": {"names": "eval/*", "allow": ["repair", "strip"]},
}


def test_an_experiment_wants_another_strength_with_the_policys_statistics_or_none():
    own = parse_policy(REPAIRING, "policy")
    other = experiment_policy(own, ExperimentSettings(repair={"strength": 0.3}), with_plan=False)
    assert other.repair == own.repair.model_copy(update={"strength": 0.3})
    off = experiment_policy(own, ExperimentSettings(repair="off"), with_plan=False)
    assert off.repair is None
    kept = experiment_policy(own, ExperimentSettings(strip={"top_k": 1}), with_plan=False)
    assert kept.repair == own.repair


def test_repair_must_be_allowed_and_have_statistics():
    with pytest.raises(ExperimentClosed, match="does not list repair"):
        experiment_policy(policy(), ExperimentSettings(repair={"strength": 0.3}), with_plan=False)
    without = parse_policy(REPAIRING | {"repair": None}, "policy")
    with pytest.raises(ExperimentClosed, match="has no repair"):
        experiment_policy(without, ExperimentSettings(repair={"strength": 0.3}), with_plan=False)


def test_an_experiment_names_no_statistics():
    with pytest.raises(ValueError, match="statistics"):
        ExperimentSettings(repair={"strength": 0.3, "statistics": "/etc/passwd"})
