"""Attested verdicts: what `s3lora attest` signs, in-toto verifies and the gate accepts."""

import base64
import json
import shutil
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from google.protobuf.json_format import ParseDict
from in_toto.models.metadata import Envelope
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementProto
from securesystemslib.signer import SSlibKey
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.cli import app
from s3lora_serve.signatures.attestation import PREDICATE_TYPE
from s3lora_serve.signatures.envelope import signed
from s3lora_serve.signatures.trust import key_id
from tests.support.adapters import CONFIG, WEIGHTS, copy_with, diverged, spike
from tests.support.signing import key_pair

FILE = "s3lora-attestation.json"
RULES = {"strip": {"top_k": 2}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def scanner(keys):
    return key_pair(keys, "scanner", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


def policy(scanner, **more):
    attestations = {"require": True, "keys": [str(scanner.public)], **more}
    return Policy.model_validate(RULES | {"attestations": attestations})


def attest(folder, pair, file, *options, rules=RULES, expect=0):
    file.write_text(json.dumps(rules))
    arguments = ["attest", str(folder), "--key", str(pair.private), "--policy", str(file)]
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == expect, done.output
    return done


def code(verdict):
    return verdict.reason and verdict.reason.code


@pytest.fixture
def attested(adapter, scanner, tmp_path):
    attest(adapter, scanner, tmp_path / "policy.json")
    return adapter


def resigned(folder, pair, change):
    """The attestation, changed and signed again."""
    envelope = json.loads((folder / FILE).read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    (folder / FILE).write_text(json.dumps(signed(json.dumps(statement).encode(), pair.key)))


@pytest.mark.parametrize(
    "made",
    [
        ed25519.Ed25519PrivateKey.generate,
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
    ],
)
def test_in_toto_verifies_what_is_attested_and_the_gate_accepts_it(adapter, tmp_path, made):
    pair = key_pair(tmp_path, "scanner", made())
    attest(adapter, pair, tmp_path / "policy.json")
    public = pair.key.public_key()
    envelope = Envelope.load(str(adapter / FILE))
    key = SSlibKey.from_crypto(public, keyid=key_id(public))
    envelope.verify_signature(key.to_dict() | {"keyid": key.keyid})
    proto = ParseDict(json.loads(envelope.payload), StatementProto())
    Statement.copy_from_pb(proto).validate()
    assert proto.predicate_type == PREDICATE_TYPE
    assert {subject.name for subject in proto.subject} == {WEIGHTS, CONFIG}
    verdict = scan_adapter(adapter, policy(pair))
    assert code(verdict) is None
    assert verdict.attested_by.key == key_id(public)
    assert verdict.scored_by == "gate"
    assert type(verdict).from_json(verdict.as_json()) == verdict


def test_adapter_without_an_attestation_is_refused_only_where_one_is_required(trained, scanner):
    assert code(scan_adapter(trained, policy(scanner))) == "S3LORA-216"
    verdict = scan_adapter(trained, policy(scanner, require=False))
    assert (code(verdict), verdict.attested_by) == (None, None)


def test_attestation_of_another_key_is_refused(attested, tmp_path):
    stranger = key_pair(tmp_path, "stranger")
    assert code(scan_adapter(attested, policy(stranger))) == "S3LORA-217"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"payload": 1}', b"[" * 99_999])
def test_what_is_no_attestation_is_refused_without_an_exception(attested, scanner, content):
    (attested / FILE).write_bytes(content)
    assert code(scan_adapter(attested, policy(scanner))) == "S3LORA-217"


def test_tampered_payload_is_refused(attested, scanner):
    envelope = json.loads((attested / FILE).read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["scores"][0]["ssi"] = 0.0
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (attested / FILE).write_text(json.dumps(envelope))
    assert code(scan_adapter(attested, policy(scanner))) == "S3LORA-217"


@pytest.mark.parametrize(
    "change",
    [
        lambda statement: statement.update(predicateType="urn:s3lora-serve:verdict:v2"),
        lambda statement: statement["predicate"].update(decision="rejected"),
        lambda statement: statement["predicate"].update(more=1),
        lambda statement: statement["predicate"]["scores"][0].update(ssi=float("nan")),
        lambda statement: statement["predicate"].update(time="2026-01-01T00:00:00"),
    ],
)
def test_statement_of_a_trusted_key_that_is_no_verdict_is_refused(attested, scanner, change):
    resigned(attested, scanner, change)
    assert code(scan_adapter(attested, policy(scanner))) == "S3LORA-217"


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_attestation_of_another_adapter_is_refused(attested, scanner, tmp_path, file):
    other = copy_with(attested, tmp_path / "other", lambda _: None, lora_alpha=4)
    spiked = copy_with(attested, tmp_path / "spiked", spike("model.layers.1.self_attn.q_proj"))
    shutil.copy((other if file == CONFIG else spiked) / file, attested / file)
    verdict = scan_adapter(attested, policy(scanner))
    assert code(verdict) == "S3LORA-218"
    assert file in verdict.reason.message


def test_attestation_expires(attested, scanner):
    assert code(scan_adapter(attested, policy(scanner, max_age=3600))) is None
    resigned(attested, scanner, lambda s: s["predicate"].update(time="2026-01-01T00:00:00Z"))
    assert code(scan_adapter(attested, policy(scanner))) is None
    assert code(scan_adapter(attested, policy(scanner, max_age=3600))) == "S3LORA-219"


def test_attestation_from_the_future_is_refused(attested, scanner):
    resigned(attested, scanner, lambda s: s["predicate"].update(time="2126-01-01T00:00:00Z"))
    assert code(scan_adapter(attested, policy(scanner))) == "S3LORA-219"


def test_attestation_under_another_policy_is_refused_unless_any_will_do(adapter, scanner, tmp_path):
    attest(adapter, scanner, tmp_path / "policy.json", rules={"strip": {"top_k": 3}})
    assert code(scan_adapter(adapter, policy(scanner))) == "S3LORA-219"
    verdict = scan_adapter(adapter, policy(scanner, policy_digest="any"))
    assert (code(verdict), len(verdict.stripped)) == (None, 2)


def test_policy_whose_rule_requires_an_attestation_attests_all_the_same(adapter, scanner, tmp_path):
    demands = {"require": True, "trust_scores": True, "keys": [str(scanner.public)]}
    match = {"adapter": "acme/*", "path": str(adapter.resolve())}
    rule = {"match": match, "strip": {"top_k": 1}, "attestations": demands}
    rules = RULES | {"rules": [rule]}
    attest(adapter, scanner, tmp_path / "policy.json", "--name", "acme/a", rules=rules)
    ours = policy(scanner).model_copy(update={"strip": Policy(strip={"top_k": 1}).strip})
    assert code(scan_adapter(adapter, ours)) is None
    assert code(scan_adapter(adapter, policy(scanner))) == "S3LORA-219"


def test_policy_keys_that_decide_nothing_may_differ_between_scanner_and_server(
    adapter, scanner, tmp_path
):
    own = RULES | {
        "audit": {"path": str(tmp_path / "log")},
        "mode": "audit",
        "limits": {"roots": [str(tmp_path)]},
        "attestations": {"require": True, "keys": [str(scanner.public)]},
    }
    attest(adapter, scanner, tmp_path / "policy.json", rules=own)
    assert code(scan_adapter(adapter, policy(scanner))) is None


def test_attested_scores_are_taken_only_where_the_policy_trusts_them(attested, scanner):
    own = scan_adapter(attested, policy(scanner))

    def sharper(statement):
        for score in statement["predicate"]["scores"]:
            score["relative_ssi"] = score["ssi"] = 1.0 if "layers.0" in score["name"] else 0.5

    unchanged = scan_adapter(attested, policy(scanner, trust_scores=True))
    assert unchanged.scored_by == "attestation"
    assert (
        replace(unchanged, seconds=own.seconds, scored_by="gate", policy_digest=own.policy_digest)
        == own
    )
    resigned(attested, scanner, sharper)
    assert scan_adapter(attested, policy(scanner)).stripped == own.stripped
    trusted = scan_adapter(attested, policy(scanner, trust_scores=True))
    assert all("layers.0" in name for name in trusted.stripped)
    assert len(trusted.stripped) == 2


def test_attested_scores_of_other_modules_are_not_taken(attested, scanner):
    resigned(attested, scanner, lambda statement: statement["predicate"]["scores"].pop())
    verdict = scan_adapter(attested, policy(scanner, trust_scores=True))
    assert (code(verdict), verdict.scored_by) == (None, "gate")


def test_audit_mode_says_what_is_missing_and_scores_all_the_same(trained, scanner):
    audit = policy(scanner).model_copy(update={"mode": "audit"})
    verdict = scan_adapter(trained, audit)
    assert (code(verdict), verdict.decision) == ("S3LORA-216", "rejected")
    assert len(verdict.modules) == 28
    assert verdict.served_digest == verdict.digest


def test_untrusted_attestation_gives_no_scores(attested, scanner, tmp_path):
    stranger = key_pair(tmp_path, "stranger")
    verdict = scan_adapter(attested, policy(stranger, require=False, trust_scores=True))
    assert (code(verdict), verdict.scored_by, verdict.attested_by) == (None, "gate", None)


def test_rejected_adapter_is_not_attested(trained, scanner, tmp_path):
    bad = copy_with(trained, tmp_path / "bad", diverged)
    done = attest(bad, scanner, tmp_path / "policy.json", expect=1)
    assert "S3LORA-109" in done.stderr
    assert not (bad / FILE).exists()


def test_wrong_key_file_is_said_and_nothing_is_written(adapter, scanner, tmp_path):
    public = replace(scanner, private=scanner.public)
    missing = replace(scanner, private=tmp_path / "nowhere.pem")
    for pair, said in ((public, "no private key"), (missing, "No such file")):
        done = attest(adapter, pair, tmp_path / "policy.json", expect=2)
        assert said in done.stderr
    assert not (adapter / FILE).exists()


def test_encrypted_key_takes_its_password_from_the_environment(adapter, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
    )

    pair = key_pair(tmp_path, "scanner")
    pair.private.write_bytes(
        pair.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    )
    assert "no private key" in attest(adapter, pair, tmp_path / "policy.json", expect=2).stderr
    monkeypatch.setenv("S3LORA_KEY_PASSWORD", "word")
    attest(adapter, pair, tmp_path / "policy.json", "-o", str(tmp_path / "out.json"))
    assert (tmp_path / "out.json").exists()
