"""Signatures on adapters: what the model-signing command line signs, the gate accepts."""

import base64
import hashlib
import json
import os
import resource
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import model_signing.hashing
import model_signing.signing
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.signatures.records import Vouchers
from s3lora_serve.signatures.trust import check_trusted, key_id
from tests.support.adapters import CONFIG, WEIGHTS
from tests.support.signing import (
    SIGNATURE,
    certified,
    key_pair,
    sign,
    sign_with_certificate,
)
from tests.support.sigstore_instance import SigstoreInstance


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def acme(keys):
    return key_pair(keys, "acme")


@pytest.fixture(scope="module")
def other(keys):
    return key_pair(keys, "other")


@pytest.fixture(scope="module")
def signed_once(trained, acme, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed") / "adapter"
    shutil.copytree(trained, folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "card.txt").write_text("a card\n")
    sign(folder, acme)
    return folder


@pytest.fixture
def signed(signed_once, tmp_path):
    return shutil.copytree(signed_once, tmp_path / "adapter")


def policy(*keys, require=True, **more):
    return Policy.model_validate(
        {"signatures": {"require": require, "keys": [str(key.public) for key in keys], **more}}
    )


def code(verdict):
    return verdict.reason and verdict.reason.code


def test_signature_of_a_trusted_key_is_accepted_and_the_verdict_says_whose(signed, acme, other):
    verdict = scan_adapter(signed, policy(other, acme))
    assert code(verdict) is None
    assert verdict.signed_by.kind == "key"
    assert verdict.signed_by.id == key_id(acme.key.public_key())
    assert type(verdict).from_json(verdict.as_json()) == verdict


def test_rule_by_signer_relaxes_for_what_that_signer_signed_alone(signed, acme, other, tmp_path):
    """The name is the adapter's choice; the signature is not."""
    rule = {
        "match": {"signer": key_id(acme.key.public_key())},
        "limits": {"min_rank": 1},
        "strip": {"top_k": 0},
    }
    base = policy(acme, other).as_json() | {"limits": {"min_rank": 64}}
    ruled = Policy.model_validate(base | {"rules": [rule]})
    verdict = scan_adapter(signed, ruled)
    assert (code(verdict), verdict.decision.value) == (None, "admitted")
    before = Vouchers(verdict.signed_by)
    again = admit(
        signed, "x", ruled, circumstances=Circumstances(origin=signed, vouchers=before)
    ).verdict
    assert again.decision is verdict.decision
    (signed / SIGNATURE).unlink()
    sign(signed, other)
    assert code(scan_adapter(signed, ruled)) == "S3LORA-201"


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_of_model_signing_is_accepted(trained, tmp_path, curve):
    pair = key_pair(tmp_path, "large", ec.generate_private_key(curve))
    folder = shutil.copytree(trained, tmp_path / "adapter")
    sign(folder, pair)
    assert scan_adapter(folder, policy(pair)).signed_by.id == key_id(pair.key.public_key())


def test_signature_over_other_digests_is_accepted_and_holds_the_weights(trained, acme, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "adapter")
    hashing = model_signing.hashing.Config().use_file_serialization(hashing_algorithm="blake3")
    hashing.set_ignored_paths(paths=[SIGNATURE])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=acme.private)
    config.set_hashing_config(hashing).sign(folder, folder / SIGNATURE)
    assert scan_adapter(folder, policy(acme)).signed_by.id == key_id(acme.key.public_key())
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    assert code(scan_adapter(folder, policy(acme))) == "S3LORA-214"


def test_adapter_without_a_signature_is_refused_only_where_one_is_required(trained, acme):
    assert code(scan_adapter(trained, policy(acme))) == "S3LORA-212"
    verdict = scan_adapter(trained, policy(acme, require=False))
    assert (code(verdict), verdict.signed_by) == (None, None)


def test_signature_of_another_key_is_refused_and_counts_as_none_where_none_is_required(
    signed, other
):
    assert code(scan_adapter(signed, policy(other))) == "S3LORA-213"
    verdict = scan_adapter(signed, policy(other, require=False))
    assert (code(verdict), verdict.signed_by) == (None, None)


@pytest.mark.parametrize("require", [True, False])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "notes/card.txt"])
def test_changed_file_under_a_trusted_signature_is_refused(signed, acme, require, name):
    data = bytearray((signed / name).read_bytes())
    data[-1] ^= 1
    (signed / name).write_bytes(data)
    assert code(scan_adapter(signed, policy(acme, require=require))) == "S3LORA-214"


def test_missing_file_under_a_trusted_signature_is_refused(signed, acme):
    (signed / "notes" / "card.txt").unlink()
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-214"


@pytest.mark.parametrize("name", ["more.txt", "notes/more.txt", "deep/er/more.txt"])
def test_file_beside_the_signed_ones_is_refused_by_name(signed, acme, name):
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("not signed")
    verdict = scan_adapter(signed, policy(acme))
    assert code(verdict) == "S3LORA-215"
    assert name in verdict.reason.message


def test_link_to_a_folder_is_refused(signed, acme, tmp_path):
    (signed / "link").symlink_to(tmp_path)
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-215"


def test_folder_of_too_many_files_or_folders_is_refused(signed, acme):
    for number in range(10_001):
        (signed / f"empty{number}").mkdir()
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-201"


def test_folders_nested_without_end_are_refused_and_take_no_descriptors(signed, acme):
    here = os.open(signed, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, before[1]))
    try:
        verdict = scan_adapter(signed, policy(acme))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        subprocess.run(["rm", "-r", str(signed / "d")], check=True)  # Python's own recurses
    assert code(verdict) == "S3LORA-215"


def test_files_of_git_that_model_signing_leaves_out_are_left_out(trained, acme, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "adapter")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    sign(folder, acme)
    assert code(scan_adapter(folder, policy(acme))) is None
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/other\n")
    assert code(scan_adapter(folder, policy(acme))) is None


def test_attestation_beside_the_signed_files_needs_no_signature(signed, acme):
    (signed / "s3lora-attestation.json").write_text("{}")
    assert code(scan_adapter(signed, policy(acme))) is None


@pytest.mark.parametrize("ignored", [WEIGHTS, CONFIG])
def test_signature_that_leaves_out_a_served_file_is_refused(trained, acme, tmp_path, ignored):
    folder = shutil.copytree(trained, tmp_path / "adapter")
    sign(folder, acme, "--ignore-paths", str(folder / ignored))
    verdict = scan_adapter(folder, policy(acme))
    assert code(verdict) == "S3LORA-214"
    assert ignored in verdict.reason.message


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"verificationMaterial": 1}', b"[" * 100_000],
)
def test_what_is_no_signature_is_refused_without_an_exception(signed, acme, content):
    (signed / SIGNATURE).write_bytes(content)
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-213"


def test_tampered_manifest_is_refused(signed, acme):
    bundle = json.loads((signed / SIGNATURE).read_bytes())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"].pop()
    encoded = base64.b64encode(json.dumps(payload).encode()).decode()
    bundle["dsseEnvelope"]["payload"] = encoded
    (signed / SIGNATURE).write_text(json.dumps(bundle))
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-213"


@pytest.mark.parametrize("place", [(), ("dsseEnvelope",)])
def test_second_spelling_of_a_bundles_keys_is_refused(signed, acme, place):
    """The library and the gate could read different payloads."""
    bundle = json.loads((signed / SIGNATURE).read_bytes())
    part = bundle
    for key in place:
        part = part[key]
    part["payload_type" if place else "dsse_envelope"] = dict(bundle["dsseEnvelope"])
    (signed / SIGNATURE).write_text(json.dumps(bundle))
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-213"


def test_refusal_tells_no_digest_of_a_file_that_a_link_leads_to(signed, acme, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a secret\n")
    (signed / "notes" / "card.txt").unlink()
    (signed / "notes" / "card.txt").symlink_to(secret)
    reason = scan_adapter(signed, policy(acme)).reason
    assert reason.code == "S3LORA-214"
    assert "notes/card.txt" in reason.message
    assert hashlib.sha256(secret.read_bytes()).hexdigest() not in reason.message


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", f"./{WEIGHTS}", "a//b.txt"])
def test_object_whose_name_leads_out_of_its_folder_is_refused(signed, acme, name):
    class Storage(RemoteFolder):
        def names(self):
            yield name

        def file(self, asked, *_most):
            return (signed / SIGNATURE).read_bytes() if asked == SIGNATURE else b"bent"

        def copy(self, limits):
            return copy_adapter(signed, limits)

    verdict = admit(Storage("memory://bent"), "bent", policy(acme)).verdict
    assert code(verdict) == "S3LORA-215"


def test_signature_larger_than_the_limit_is_refused(signed, acme):
    (signed / SIGNATURE).write_bytes(b" " * (4 * 2**20 + 1))
    assert code(scan_adapter(signed, policy(acme))) == "S3LORA-201"


def test_certificate_under_a_trusted_root_is_accepted_and_its_subject_named(
    trained, keys, tmp_path
):
    signer, stranger = certified(keys, "alice"), certified(keys, "mallory")
    folder = shutil.copytree(trained, tmp_path / "adapter")
    sign_with_certificate(folder, signer)
    trusts = {"require": True, "certificates": [str(signer.root)]}
    verdict = scan_adapter(folder, Policy.model_validate({"signatures": trusts}))
    assert code(verdict) is None
    assert (verdict.signed_by.kind, verdict.signed_by.subject) == (
        "certificate",
        "O=Acme,CN=alice",
    )
    trusts = {"require": True, "certificates": [str(stranger.root)]}
    verdict = scan_adapter(folder, Policy.model_validate({"signatures": trusts}))
    assert code(verdict) == "S3LORA-213"


def test_identity_is_accepted_with_a_trust_root_and_no_other_identity_issuer_or_root_is(
    signed, tmp_path
):
    ours, theirs = SigstoreInstance(), SigstoreInstance()
    payload = base64.b64decode(
        json.loads((signed / SIGNATURE).read_bytes())["dsseEnvelope"]["payload"]
    )
    alice, issuer = "alice@acme.test", "https://issuer.test"
    (signed / SIGNATURE).write_text(json.dumps(ours.signed(payload, alice, issuer)))
    roots = [
        str(each.trust_config(tmp_path / f"root-{i}.json")) for i, each in enumerate((ours, theirs))
    ]

    def scanned(identity=alice, issuer=issuer, root=roots[0]):
        who = [{"identity": identity, "issuer": issuer}]
        trusts = {"require": True, "identities": who, "trust_root": root}
        policy = Policy.model_validate({"signatures": trusts})
        check_trusted(policy)
        return scan_adapter(signed, policy)

    verdict = scanned()
    assert code(verdict) is None
    assert verdict.signed_by.kind == "identity"
    assert verdict.signed_by.id == "alice@acme.test (https://issuer.test)"
    assert code(scanned(identity="mallory@acme.test")) == "S3LORA-213"
    assert code(scanned(issuer="https://other.test")) == "S3LORA-213"
    assert code(scanned(root=roots[1])) == "S3LORA-213"
    (signed / "more.txt").write_text("not signed")
    assert code(scanned()) == "S3LORA-215"
    (signed / "more.txt").unlink()
    data = bytearray((signed / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (signed / WEIGHTS).write_bytes(data)
    assert code(scanned()) == "S3LORA-214"


def test_rule_requires_a_signature_of_some_adapters_only(trained, signed, acme):
    demanding = Policy.model_validate(
        {
            "signatures": {"keys": [str(acme.public)]},
            "rules": [{"match": {"adapter": "adapter"}, "signatures": {"require": True}}],
        }
    )
    assert code(scan_adapter(trained, demanding)) is None
    assert scan_adapter(signed, demanding).signed_by
    (signed / SIGNATURE).unlink()
    assert code(scan_adapter(signed, demanding)) == "S3LORA-212"


def test_adapter_in_remote_storage_is_verified_too(signed, acme):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(signed), "/signed/adapter", recursive=True)
    try:
        verdict = scan_adapter("memory://signed/adapter", policy(acme))
        assert (code(verdict), bool(verdict.signed_by)) == (None, True)
        memory.pipe("/signed/adapter/more.txt", b"not signed")
        assert code(scan_adapter("memory://signed/adapter", policy(acme))) == "S3LORA-215"
        memory.rm("/signed/adapter/model.sig")
        assert code(scan_adapter("memory://signed/adapter", policy(acme))) == "S3LORA-212"
    finally:
        memory.rm("/signed", recursive=True)


LARGE = 48 * 2**20


@pytest.fixture(scope="module")
def with_optimizer(trained, acme, tmp_path_factory):
    """A signed checkpoint with a file that is much larger than the adapter."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("large") / "adapter")
    with (folder / "optimizer.pt").open("wb") as file:
        file.truncate(LARGE)
    sign(folder, acme)
    return folder


def test_signed_files_are_streamed_and_none_is_kept_in_memory(with_optimizer, acme):
    scan_adapter(with_optimizer, policy(acme))  # imports its libraries
    tracemalloc.start()
    try:
        verdict = scan_adapter(with_optimizer, policy(acme))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (code(verdict), bool(verdict.signed_by)) == (None, True)
    assert most < LARGE // 2


@pytest.fixture
def bytes_read(monkeypatch):
    """How many bytes of each size of file the gate has read."""
    read, preadv = {}, os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        size = os.fstat(descriptor).st_size
        read[size] = read.get(size, 0) + count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return read


def test_files_are_read_once_and_only_after_the_signature_holds(
    with_optimizer, acme, other, bytes_read
):
    assert code(scan_adapter(with_optimizer, policy(other))) == "S3LORA-213"
    assert LARGE not in bytes_read
    assert code(scan_adapter(with_optimizer, policy(acme))) is None
    assert bytes_read[LARGE] == LARGE


def test_unsigned_file_is_refused_before_any_signed_one_is_read(
    with_optimizer, acme, bytes_read, tmp_path
):
    folder = shutil.copytree(with_optimizer, tmp_path / "adapter")
    (folder / "more.txt").write_text("not signed")
    assert code(scan_adapter(folder, policy(acme))) == "S3LORA-215"
    assert LARGE not in bytes_read


@pytest.mark.parametrize("size", [1000, 10_000_000])
def test_signature_over_parts_of_files_is_accepted_and_holds_each_file(
    trained, acme, tmp_path, size
):
    folder = shutil.copytree(trained, tmp_path / "adapter")
    (folder / "card.txt").write_text("x" * 2500)
    hashing = model_signing.hashing.Config().use_shard_serialization(shard_size=size)
    hashing.set_ignored_paths(paths=[SIGNATURE])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=acme.private)
    config.set_hashing_config(hashing).sign(folder, folder / SIGNATURE)
    assert code(scan_adapter(folder, policy(acme))) is None
    for name in ("card.txt", WEIGHTS):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        verdict = scan_adapter(folder, policy(acme))
        (folder / name).write_bytes(data)
        assert code(verdict) == "S3LORA-214"
        assert name in verdict.reason.message
