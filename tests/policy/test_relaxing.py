"""A rule that names alone have to match relaxes nothing that the policy requires."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.policy.relaxing import METHOD, STRICTER, is_fixed_folder, relaxed_keys
from s3lora_serve.policy.schema import Policy, parse_policy

DIGESTS = ["sha256:" + digit * 64 for digit in "abc"]
BOUNDS = st.none() | st.integers(1, 9)
VALUES = {
    "limits": {
        "max_stripped_fraction": st.sampled_from([0.1, 0.5, 1.0]),
        "max_scaling": BOUNDS,
        "max_norm_ratio": BOUNDS,
        "seconds": st.integers(1, 9),
        "download_seconds": st.integers(1, 9),
        "max_bytes": st.integers(1, 9),
        "min_rank": st.integers(1, 9),
        "negative_alpha": st.booleans(),
        "max_rank": st.integers(1, 9),
        "roots": st.lists(st.sampled_from(["/a", "/a/b", "/c", "/a/../c"]), max_size=2),
    },
    "signatures": {
        "require": st.booleans(),
        "keys": st.lists(st.sampled_from(["/k1", "/k2"]), unique=True, min_size=1),
    },
    "attestations": {
        "require": st.booleans(),
        "keys": st.lists(st.sampled_from(["/k1", "/k2"]), unique=True, min_size=1),
        "max_age": BOUNDS,
        "policy_digest": st.sampled_from(["same", "any"]),
        "trust_scores": st.booleans(),
    },
}
PLAIN = {
    "deny": st.lists(st.sampled_from(DIGESTS), unique=True),
    "on_uninformative": st.sampled_from(["reject", "admit"]),
    "on_unscorable": st.sampled_from(["reject", "admit", "strip"]),
    "require_plan": st.booleans(),
}
KEYS = st.fixed_dictionaries(
    {},
    optional=PLAIN | {part: st.fixed_dictionaries({}, optional=VALUES[part]) for part in VALUES},
)
BASE = {"plans": "/plans", "signatures": {"keys": ["/k"]}, "attestations": {"keys": ["/k"]}}


def with_rules(base, *rules):
    return parse_policy(BASE | base | {"rules": list(rules)}, "test")


def may_admit_more(old, new):
    """Whether some adapter that a policy refuses is admitted under another one, value by value.

    Written apart from the tables: each entry asks for one adapter (or folder, signer, age, …).
    """
    of = {
        "scaling": lambda p, x: p.limits.max_scaling is None or x <= p.limits.max_scaling,
        "norm": lambda p, x: p.limits.max_norm_ratio is None or x <= p.limits.max_norm_ratio,
        "stripped": lambda p, x: x / 10 <= p.limits.max_stripped_fraction,
        "seconds": lambda p, x: x <= p.limits.seconds,
        "download": lambda p, x: x <= p.limits.download_seconds,
        "bytes": lambda p, x: x <= p.limits.max_bytes,
        "rank": lambda p, x: (
            p.limits.min_rank <= x <= max(p.limits.max_rank, p.limits.min_rank)
            and x <= p.limits.max_rank
        ),
        "age": lambda p, x: p.attestations.max_age is None or x <= p.attestations.max_age,
        "any policy": lambda p, _: p.attestations.policy_digest == "any",
        "unsigned": lambda p, _: not p.signatures.require,
        "unattested": lambda p, _: not p.attestations.require,
        "negative alpha": lambda p, _: p.limits.negative_alpha,
        "unplanned": lambda p, _: not p.require_plan,
        "unscored": lambda p, _: p.attestations.trust_scores,
        "unranked": lambda p, _: p.on_uninformative == "admit",
        "part": lambda p, _: p.on_unscorable != "reject",
        "whole": lambda p, _: p.on_unscorable == "admit",
    }
    return any(
        admits(new, x) and not admits(old, x) for admits in of.values() for x in range(1, 11)
    ) or any(digest in old.deny and digest not in new.deny for digest in DIGESTS)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_rule_by_name_that_is_accepted_admits_nothing_that_the_policy_refuses(base, keys):
    try:
        whole = parse_policy(BASE | base, "test")
        variant = with_rules(base, {"match": {"path": "/x/**"}} | keys).variants()[0]
    except PolicyInvalid:
        assume(False)
    try:
        with_rules(base, {"match": {"adapter": "internal/*"}} | keys)
    except PolicyInvalid as refusal:
        said = str(refusal)
        assert "rules.0 relaxes" in said
    else:
        assert not may_admit_more(whole, variant)
        assert variant.signatures.keys == whole.signatures.keys
        assert variant.attestations.keys == whole.attestations.keys


@settings(deadline=None)
@given(KEYS)
def test_a_rule_that_says_what_the_policy_says_relaxes_nothing(keys):
    try:
        whole = parse_policy(BASE | keys, "test")
    except PolicyInvalid:
        assume(False)
    assert relaxed_keys(whole.as_json(), whole.as_json()) == []
    assert with_rules(keys, {"match": {"adapter": "a"}} | keys)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_rule_by_name_does_not_lift_what_a_later_rule_by_path_demands(before, demands):
    path = {"match": {"path": "/tenants/**"}} | demands
    try:
        by_path = with_rules({}, path).variants()[0]
        both = with_rules({}, {"match": {"adapter": "free/*"}} | before, path)
    except PolicyInvalid:
        assume(False)
    assert not may_admit_more(by_path, both.for_adapter("free/a", "/tenants/a", None))


@pytest.mark.parametrize("match", [
    {"adapter": "internal/*"}, {"base_model": "llama*"}, {"adapter": "a", "base_model": "b"}, {},
    {"path": "**"}, {"path": "/**"}, {"path": "**/internal/*"}, {"path": "/int*/**"},
    {"path": "s3://*/internal"},
])  # fmt: skip
@pytest.mark.parametrize("keys", [
    {"signatures": {"require": False}}, {"attestations": {"require": False}},
    {"attestations": {"trust_scores": True}}, {"require_plan": False},
    {"limits": {"max_rank": 512}}, {"limits": {"negative_alpha": True}},
    {"limits": {"roots": []}}, {"limits": {"roots": ["/a/../b"]}},
    {"on_unscorable": "strip"}, {"on_uninformative": "admit"}, {"deny": []},
    {"allow": [{"digest": DIGESTS[1], "config_digest": DIGESTS[1]}]},
    {"signatures": {"keys": ["/mine"]}},
])  # fmt: skip
def test_nothing_is_relaxed_unless_a_folder_has_to_match(match, keys):
    base = {
        "signatures": {"require": True, "keys": ["/k"]},
        "attestations": {"require": True, "keys": ["/k"]},
        "require_plan": True,
        "limits": {"roots": ["/a"]},
        "deny": [DIGESTS[0]],
    }
    with pytest.raises(PolicyInvalid, match=r"rules\.0 relaxes .*: add path"):
        with_rules(base, {"match": match} | keys)
    if "path" not in match:
        assert with_rules(base, {"match": match | {"path": "/adapters/internal/**"}} | keys)
    if not {"signatures", "attestations", "limits"} & keys.keys():
        assert with_rules(base, {"match": match | {"signer": DIGESTS[0]}} | keys)


def test_the_tables_name_keys_of_the_policy_and_an_unknown_key_counts_as_relaxed():
    leaves = set(Policy.model_fields)
    for name, field in Policy.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            leaves |= {f"{name}.{inner}" for inner in type(default).model_fields}
    leaves |= {f"repair.{inner}" for inner in RepairChoice.model_fields}  # None by default
    assert METHOD | set(STRICTER) <= leaves
    assert not METHOD & set(STRICTER)
    json = Policy().as_json()
    assert relaxed_keys(json, json | {"new": 1}) == ["new"]
    assert relaxed_keys(json, json | {"limits": json["limits"] | {"new": 1}}) == ["limits.new"]


@pytest.mark.parametrize(("glob", "fixed"), [
    ("/adapters/acme/**", True), ("/adapters/acme", True), ("s3://acme/**", True),
    ("/a*/b", False), ("*/a", False), ("?/a", False), ("//**", False), ("", True),
])  # fmt: skip
def test_a_fixed_folder_comes_before_any_wildcard(glob, fixed):
    assert is_fixed_folder(glob) is fixed
