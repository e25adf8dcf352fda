"""Owners: a name is loaded, replaced and unloaded by its owner alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.owners import foreign_load, foreign_unload
from s3lora_serve.policy.schema import Policy, parse_policy

KEY, OTHER = "0123456789abcdef", "f" * 16
SIGNER = "sha256:" + "a" * 64


def owners(*entries):
    data = {"signatures": {"keys": ["/k"]}, "owners": list(entries)}
    return parse_policy(data, "test").owners


ACME = {"names": "acme/*", "paths": ["/adapters/acme/**"], "signers": [SIGNER]}


@pytest.mark.parametrize(("name", "path", "signer", "own"), [
    ("acme/a", "/adapters/acme/a", None, True),
    ("acme/a", "/adapters/globex/a", SIGNER, True),
    ("acme/a", "/adapters/globex/a", None, False),
    ("acme/a", "/adapters/globex/a", "sha256:" + "b" * 64, False),
    ("acme/a", "/adapters/acme", None, False),
    ("globex/a", "/adapters/globex/a", None, True),
    ("acme/a/b", "/adapters/globex/a", None, True),
])  # fmt: skip
def test_a_name_is_loaded_from_its_owners_folder_or_with_its_signature(name, path, signer, own):
    found = foreign_load(owners(ACME), name, path, signer, OTHER)
    assert (found is None) is own
    assert own or str(found).startswith("S3LORA-222: ")


@pytest.mark.parametrize(
    ("asked_with", "own"), [(KEY, True), (OTHER, False), ("", False), (None, True)]
)
def test_keys_are_asked_of_clients_beside_the_folder(asked_with, own):
    with_keys = owners({"names": "acme/*", "paths": ["/adapters/acme/**"], "keys": [KEY]})
    by_path = ("acme/a", "/adapters/acme/a", None)
    assert (foreign_load(with_keys, *by_path, asked_with) is None) is own
    assert foreign_load(with_keys, "acme/a", "/elsewhere", None, asked_with)


@pytest.mark.parametrize(
    ("asked_with", "own"), [(KEY, True), (OTHER, False), ("", False), (None, False)]
)
def test_an_owned_name_is_unloaded_with_an_owners_key_and_by_nobody_else(asked_with, own):
    with_keys = owners({"names": "acme/*", "keys": [KEY]})
    assert (foreign_unload(with_keys, "acme/a", asked_with) is None) is own
    assert foreign_unload(owners(ACME), "acme/a", asked_with)
    assert foreign_unload(owners(ACME), "globex/a", asked_with) is None


def test_the_first_owner_of_a_name_counts():
    both = owners({"names": "acme/vip", "paths": ["/vip/**"]}, ACME)
    assert foreign_load(both, "acme/vip", "/adapters/acme/vip", SIGNER, None)
    assert foreign_load(both, "acme/vip", "/vip/a", None, None) is None


@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from([None, "", KEY]))
def test_without_owners_every_name_is_anybodys(name, path, asked_with):
    assert foreign_load(Policy().owners, name, path, None, asked_with) is None
    assert foreign_unload(Policy().owners, name, asked_with) is None


@pytest.mark.parametrize(("data", "words"), [
    ({"owners": [{"names": "a"}]}, "expected paths, signers or keys"),
    ({"owners": [{"names": "a", "paths": ["/**"]}]}, "expected a folder before"),
    ({"owners": [{"names": "a", "keys": ["sk-1"]}]}, "keys"),
    ({"owners": [{"names": "a", "signers": [SIGNER]}]}, "needs signatures"),
    ({"rules": [{"match": {"path": "/a/*"}, "owners": []}]}, "owners cannot be set by a rule"),
])  # fmt: skip
def test_owners_that_bind_nothing_are_refused(data, words):
    with pytest.raises(PolicyInvalid, match=words):
        parse_policy(data, "test")
