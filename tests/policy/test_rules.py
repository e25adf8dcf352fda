"""Rules of the policy: what an adapter must have for one, and what one may set."""

import pytest

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.schema import parse_policy

SIGNER = "sha256:" + "a" * 64
KEYS = {"signatures": {"keys": ["/k"]}}


def with_rule(match, **keys):
    return parse_policy(KEYS | {"rules": [{"match": match} | keys]}, "test")


@pytest.mark.parametrize(("signer", "admits"), [
    (SIGNER, True), ("sha256:" + "b" * 64, False), (None, False),
])  # fmt: skip
def test_rule_by_signer_is_for_adapters_with_that_verified_signer(signer, admits):
    own = with_rule({"signer": SIGNER}, on_uninformative="admit")
    found = own.for_adapter("a", "/a", None, signer)
    assert (found.on_uninformative == "admit") is admits


def test_rule_by_signer_and_name_needs_both():
    own = with_rule({"signer": SIGNER, "adapter": "acme/*"}, on_uninformative="admit")
    names = ("acme/a", "globex/a")
    found = [own.for_adapter(name, "/a", None, SIGNER).on_uninformative for name in names]
    assert found == ["admit", "reject"]


@pytest.mark.parametrize(("keys", "named"), [
    ({"signatures": {"require": False}}, "signatures"),
    ({"attestations": {"require": False}}, "attestations"),
    ({"scorer": {"name": "svd"}}, "scorer"),
    ({"modules": ["q_proj"]}, "modules"),
    ({"limits": {"max_bytes": 1, "roots": ["/a"]}}, "limits.max_bytes, limits.roots"),
    ({"limits": {"seconds": 1}}, "limits.seconds"),
])  # fmt: skip
def test_rule_by_signer_sets_nothing_that_is_used_before_the_signature_is_verified(keys, named):
    with pytest.raises(PolicyInvalid, match=f"{named} cannot be set by signer: .*match by path"):
        with_rule({"signer": SIGNER}, **keys)


def test_rule_by_signer_without_signers_in_the_policy_is_refused():
    rule = {"match": {"signer": SIGNER}, "on_uninformative": "admit"}
    with pytest.raises(PolicyInvalid, match=r"match\.signer needs signatures"):
        parse_policy({"rules": [rule]}, "test")


@pytest.mark.parametrize(("keys", "words"), [
    ({"mode": "off", "rates": {}}, "mode, rates cannot be set by a rule"),
    ({"scorer": {"reference": "/r"}}, "scorer.reference cannot be set by a rule"),
    ({"colour": "red"}, "rules.0: colour"),
])  # fmt: skip
def test_rule_sets_only_keys_of_one_adapter(keys, words):
    with pytest.raises(PolicyInvalid, match=words):
        with_rule({"path": "/a/**"}, **keys)
