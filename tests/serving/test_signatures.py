"""Signatures and attestations on a real engine: what was verified is what is served."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.signatures.trust import key_id
from tests.serving.conftest import answers, evicting_server, log_of_failed_start
from tests.support.adapters import WEIGHTS, copy_with
from tests.support.signing import key_pair, sign

pytestmark = pytest.mark.serving

ATTESTATION = "s3lora-attestation.json"


@pytest.fixture(scope="module")
def acme(workplace):
    return key_pair(workplace, "acme")


@pytest.fixture(scope="module")
def scanner(workplace):
    return key_pair(workplace, "scanner")


@pytest.fixture(scope="module")
def policy(acme, scanner, workplace):
    return {
        "strip": {"top_k": 3},
        "signatures": {"keys": [str(acme.public)]},
        "attestations": {"keys": [str(scanner.public)]},
        "rules": [
            {
                "match": {"path": f"{workplace.resolve()}/scanned/**"},
                "attestations": {"require": True, "trust_scores": True},
            },
            {"match": {"adapter": "signed/*"}, "signatures": {"require": True}},
            {"match": {"adapter": "attested/*"}, "attestations": {"require": True}},
        ],
    }


@pytest.fixture(scope="module")
def policy_file(policy, workplace):
    file = workplace / "signatures.yaml"
    file.write_text(yaml.safe_dump(policy, explicit_end=True))
    return file


@pytest.fixture(scope="module")
def server(model, policy_file, workplace):
    with evicting_server(model, workplace, "signatures", policy_file) as server:
        yield server


@pytest.fixture(scope="module")
def signed(trained, acme, workplace):
    folder = copy_with(trained, workplace / "signed")
    sign(folder, acme)
    return folder


@pytest.fixture
def own(signed, tmp_path):
    """A copy of the signed adapter to change."""
    return shutil.copytree(signed, tmp_path / "own")


@pytest.fixture(scope="module")
def as_served(server, trained):
    """Answers of the adapter under the policy, without any signature."""
    assert server.load("plain", trained).status_code == 200
    found = answers(server, "plain")
    assert found != answers(server, "base")
    return found


def attest(folder, scanner, policy_file, name):
    arguments = ["attest", str(folder), "--key", str(scanner.private), "--name", name]
    done = CliRunner().invoke(app, [*arguments, "--policy", str(policy_file)])
    assert done.exit_code == 0, done.output


def refused(response, code):
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "AdapterRejected"
    assert error["message"].startswith(f"{code}: ")


def test_signed_adapter_is_served_as_verified_and_everything_says_who_signed(
    server, as_served, own, acme, spiked, workplace
):
    response = server.load("signed/acme", own)
    assert (response.status_code, response.headers["X-S3LoRA-Decision"]) == (200, "stripped")
    shutil.copy(spiked / WEIGHTS, own / WEIGHTS)  # the owner's folder counts no longer
    assert answers(server, "signed/acme") == as_served
    name = key_id(acme.key.public_key())
    verdict = server.get("/s3lora/adapters/signed/acme").json()
    assert verdict["signed_by"] == {"kind": "key", "id": name, "subject": None}
    assert name in server.get("/s3lora/?adapter=signed/acme").text
    line = json.loads((workplace / "signatures-audit.jsonl").read_text().splitlines()[-1])
    assert line["signed_by"]["id"] == name
    for i in range(2):  # evicted, and loaded again
        assert server.load(f"filler-{i}", spiked).status_code == 200
        assert answers(server, f"filler-{i}")
    assert answers(server, "signed/acme") == as_served
    refused(server.load("signed/acme", own, load_inplace=True), "S3LORA-214")


def test_unsigned_changed_or_foreign_adapter_is_refused_with_its_code(
    server, trained, own, scanner, tmp_path
):
    refused(server.load("signed/none", trained), "S3LORA-212")
    foreign = copy_with(trained, tmp_path / "foreign")
    sign(foreign, scanner)
    refused(server.load("signed/foreign", foreign), "S3LORA-213")
    (own / "more.txt").write_text("not signed")
    refused(server.load("signed/more", own), "S3LORA-215")
    metrics = server.metrics()
    assert metrics['s3lora_admissions_total{decision="rejected",mode="enforce"}'] >= 3


def test_attested_adapter_is_served_and_one_of_another_policy_is_refused(
    server, as_served, trained, scanner, policy, policy_file, tmp_path
):
    folder = copy_with(trained, tmp_path / "attested")
    refused(server.load("attested/a", folder), "S3LORA-216")
    attest(folder, scanner, policy_file, "attested/a")
    assert server.load("attested/a", folder).status_code == 200
    assert answers(server, "attested/a") == as_served
    verdict = server.get("/s3lora/adapters/attested/a").json()
    assert verdict["attested_by"]["key"] == key_id(scanner.key.public_key())
    assert verdict["scored_by"] == "gate"
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(policy | {"strip": {"top_k": 4}}, explicit_end=True))
    attest(folder, scanner, other, "attested/a")
    refused(server.load("attested/a", folder, load_inplace=True), "S3LORA-219")


def test_trusted_scores_strip_the_same_modules_as_the_gates_own(
    server, as_served, trained, scanner, policy_file, workplace
):
    folder = copy_with(trained, workplace / "scanned" / "a")
    attest(folder, scanner, policy_file, "scanned/a")
    assert server.load("scanned/a", folder).status_code == 200
    assert server.get("/s3lora/adapters/scanned/a").json()["scored_by"] == "attestation"
    assert answers(server, "scanned/a") == as_served
    assert "the scores are the attestation" in server.get("/s3lora/?adapter=scanned/a").text


def test_recheck_names_a_served_adapter_whose_signer_is_trusted_no_longer(
    server, signed, scanner, policy, policy_file
):
    assert server.load("signed/kept", signed).status_code == 200
    whole = policy_file.read_text()

    def differing():
        arguments = ["recheck", server.url(""), "--format", "json"]
        done = CliRunner().invoke(app, arguments)
        found = json.loads(done.stdout)["adapters"]
        return {one["name"]: one["after"]["reason"] for one in found if one["differs"]}

    assert "signed/kept" not in differing()
    try:
        changed = policy | {"signatures": {"keys": [str(scanner.public)]}}
        policy_file.write_text(yaml.safe_dump(changed, explicit_end=True))
        assert differing()["signed/kept"]["code"] == "S3LORA-213"
    finally:
        policy_file.write_text(whole)
        differing()


def test_server_whose_policy_names_no_readable_key_does_not_start(model, workplace):
    file = workplace / "no-key.yaml"
    file.write_text(f"signatures: {{require: true, keys: [{workplace / 'nowhere.pem'}]}}\n")
    log = log_of_failed_start(evicting_server(model, workplace, "no-key", file))
    assert "S3LORA-901" in log
    assert "nowhere.pem" in log
