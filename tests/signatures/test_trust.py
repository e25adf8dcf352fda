"""The signers of a policy: files of the operator, checked before anything is served."""

import json

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from s3lora_serve import Policy
from s3lora_serve.cli import app
from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.launcher.checks import checks
from s3lora_serve.signatures import trust
from s3lora_serve.signatures.records import Attester, Signer, Vouchers
from s3lora_serve.signatures.trust import check_trusted, key_id
from s3lora_serve.signatures.vouch import check_still_trusted
from tests.support.signing import certified, key_pair


@pytest.fixture
def pair(tmp_path):
    return key_pair(tmp_path, "acme")


def signatures(**more):
    return Policy.model_validate({"signatures": more})


@pytest.mark.parametrize(
    "given",
    [
        {"signatures": {"require": True}},
        {"signatures": {"identities": [{"identity": "a@b", "issuer": "https://c"}]}},
        {"signatures": {"file": "../model.sig"}},
        {"signatures": {"file": ""}},
        {"signatures": {"key": []}},
        {"attestations": {"require": True}},
        {"attestations": {"trust_scores": True}},
        {"attestations": {"keys": ["a"], "trust_scores": True, "policy_digest": "any"}},
        {"attestations": {"keys": ["a"], "max_age": 0}},
    ],
)
def test_policy_that_cannot_be_meant_is_refused(given):
    with pytest.raises(ValidationError):
        Policy.model_validate(given)


def test_keys_and_certificates_of_a_policy_are_checked(tmp_path, pair):
    root = certified(tmp_path, "alice").root
    check_trusted(signatures(require=True, keys=[str(pair.public)], certificates=[str(root)]))
    for wrong in ("keys", "certificates"):
        for content in (b"", b"no PEM", pair.private.read_bytes()):
            file = tmp_path / "wrong"
            file.write_bytes(content)
            with pytest.raises(PolicyInvalid):
                check_trusted(signatures(**{wrong: [str(file)]}))
        with pytest.raises(PolicyInvalid, match="No such file"):
            check_trusted(signatures(**{wrong: [str(tmp_path / "nowhere")]}))


def test_key_of_a_rule_is_checked_too(tmp_path):
    rule = {"match": {"path": "/a"}, "signatures": {"keys": [str(tmp_path / "nowhere")]}}
    with pytest.raises(PolicyInvalid, match="No such file"):
        check_trusted(Policy.model_validate({"rules": [rule]}))


def test_key_that_others_can_write_is_not_trusted(pair):
    pair.public.chmod(0o666)
    with pytest.raises(PolicyInvalid, match="written by others"):
        check_trusted(signatures(keys=[str(pair.public)]))
    with pytest.raises(PolicyInvalid, match="written by others"):
        check_trusted(Policy.model_validate({"attestations": {"keys": [str(pair.public)]}}))


def test_curve_that_model_signing_does_not_know_is_refused(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    odd = key_pair(tmp_path, "odd", ec.generate_private_key(ec.SECP256K1()))
    with pytest.raises(PolicyInvalid, match="secp256k1"):
        check_trusted(signatures(keys=[str(odd.public)]))


def test_trust_root_that_is_none_is_refused(tmp_path):
    root = tmp_path / "root.json"
    root.write_text("{}")
    who = [{"identity": "alice@acme.test", "issuer": "https://issuer.test"}]
    with pytest.raises(PolicyInvalid, match="identity"):
        check_trusted(signatures(identities=who, trust_root=str(root)))


def test_policy_that_needs_a_library_that_is_missing_is_refused(monkeypatch, pair):
    monkeypatch.setattr(trust, "LIBRARIES", dict.fromkeys(trust.LIBRARIES, "no_such_library"))
    with pytest.raises(PolicyInvalid, match=r"extra \[sign\]"):
        check_trusted(signatures(require=True, keys=[str(pair.public)]))
    check_trusted(Policy())


def test_policy_check_and_doctor_know_the_signers(tmp_path, pair, monkeypatch):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"signatures": {"require": True, "keys": [str(pair.public)]}}))
    assert CliRunner().invoke(app, ["policy", "check", str(file)]).exit_code == 0
    monkeypatch.setenv("S3LORA_POLICY", str(file))
    found = {check.name: check for check in checks()}
    assert found["signers"].passed
    assert found["signers"].detail == "1 for adapters, required; 0 for verdicts"
    pair.public.unlink()
    done = CliRunner().invoke(app, ["policy", "check", str(file)])
    assert done.exit_code == 2
    assert "No such file" in done.stderr
    found = {check.name: check for check in checks()}
    assert not found["signers"].passed
    assert found["signers"].essential


def test_stored_copy_stays_trusted_while_the_policy_names_its_signer(tmp_path, pair):
    other = key_pair(tmp_path, "other")
    policy = signatures(require=True, keys=[str(pair.public)])
    mine, theirs = (Signer("key", key_id(each.key.public_key())) for each in (pair, other))
    check_still_trusted(Vouchers(signed_by=mine), policy)
    for vouchers, code in ((Vouchers(), "S3LORA-212"), (Vouchers(theirs), "S3LORA-213")):
        with pytest.raises(Exception, match=code):
            check_still_trusted(vouchers, policy)


def test_stored_copy_stays_attested_while_key_age_and_policy_do(tmp_path, pair):
    given = {"require": True, "keys": [str(pair.public)], "max_age": 3600}
    policy = Policy.model_validate({"attestations": given})
    name, now = key_id(pair.key.public_key()), "2026-01-01T00:00:00+00:00"
    fresh = policy.model_copy(
        update={"attestations": policy.attestations.model_copy(update={"max_age": None})}
    )
    good = Attester(name, now, policy.deciding_digest)
    check_still_trusted(Vouchers(attested_by=good), fresh)
    for by, checked, code in (
        (None, fresh, "S3LORA-216"),
        (Attester("sha256:0", now, policy.deciding_digest), fresh, "S3LORA-217"),
        (good, policy, "S3LORA-219"),
        (Attester(name, now, "sha256:0"), fresh, "S3LORA-219"),
    ):
        with pytest.raises(Exception, match=code):
            check_still_trusted(Vouchers(attested_by=by), checked)
