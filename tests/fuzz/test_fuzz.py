"""No adapter or policy crashes the gate, and no adapter is admitted that cannot be scored.

The test suite runs a few examples; `make fuzz` runs FUZZ_EXAMPLES of each, a few hundred thousand.
"""

import base64
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.admission.admit import admit
from s3lora_serve.alignment.reference_file import METADATA_KEY, read_reference
from s3lora_serve.errors import (
    GateFailed,
    PlanInvalid,
    PolicyInvalid,
    ReferenceInvalid,
    rejection_codes,
)
from s3lora_serve.offline.attest import attest_adapter
from s3lora_serve.plans.apply import MAX_GROWTH
from s3lora_serve.plans.folder import plan_name
from s3lora_serve.policy.file import read_policy
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy, parse_policy
from s3lora_serve.signatures.envelope import signed
from s3lora_serve.spectral import alignment, dense_reference, spectral_sharpness
from tests.fuzz.inputs import (
    adapters,
    changed_values,
    documents,
    plans,
    policies,
    references,
)
from tests.support.plans import keep_out, plan_for, read, small_adapter
from tests.support.references import small_reference
from tests.support.signing import SIGNATURE, key_pair, sign

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
pytestmark = pytest.mark.timeout(0)

fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
LENIENT = Policy(
    strip=Strip(threshold=1.0), on_uninformative="admit", on_unscorable="admit",
    limits={"max_scaling": None, "max_stripped_fraction": 1.0},
)  # fmt: skip
POLICIES = (Policy(), LENIENT)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@fuzz
@given(files=adapters())
def test_any_adapter_gets_a_verdict_and_what_is_admitted_is_scored_as_the_dense_reference(
    folder, files
):
    config, weights = files
    (folder / CONFIG_NAME).write_bytes(config)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    for policy in POLICIES:
        admission = admit(folder, "fuzzed", policy, device="cpu")
        verdict = admission.verdict
        json.dumps(verdict.as_json())
        if verdict.decision == "rejected":
            assert verdict.reason is not None
            assert verdict.reason.code in rejection_codes()
            assert verdict.reason.code != GateFailed.code, verdict.reason
        else:
            assert_scored_as_dense(admission, weights)


def assert_scored_as_dense(admission, weights):
    """Compare with the dense definition on the tensors that the safetensors library reads."""
    verdict = admission.verdict
    scaling = {module.name: module.scaling for module in admission.adapter.modules}
    tensors = load_safetensors(weights)
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    assert verdict.modules
    for module in verdict.modules:
        B, A = (bare[f"{module.name}.lora_{side}.weight"].float().double() for side in "BA")
        assert A.isfinite().all()
        assert B.isfinite().all()
        dense = dense_reference.mas_svd(B[None], A[None], torch.ones(1)).singular_values
        expected = float(spectral_sharpness(dense))
        if module.ssi is None:
            assert scaling[module.name] == 0 or expected != expected
        else:
            assert abs(module.ssi - expected) <= accuracy(A, B)


def accuracy(*factors):
    """The promised accuracy, for up to ten decades within a factor; else rounding dominates."""
    decades = 0.0
    for factor in factors:
        sizes = factor[factor != 0].abs()
        decades = (
            max(decades, float((sizes.max() / sizes.min()).log10())) if len(sizes) else decades
        )
    return 1e-6 if decades <= 10 else 0.05


@fuzz
@given(data=policies())
def test_any_policy_is_taken_whole_or_refused_by_name(folder, data):
    try:
        policy = parse_policy(data, "fuzzed")
    except PolicyInvalid:
        return
    again = parse_policy(policy.as_json(), "again")
    assert again == policy
    assert again.digest == policy.digest
    file = folder / "policy.yaml"
    file.write_text(yaml.safe_dump(policy.as_json()))
    assert read_policy(file) == policy


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """An adapter, its plan as plain data, and the place of its plan's file."""
    place = tmp_path_factory.mktemp("planned")
    adapter = read(small_adapter(place / "adapter"))
    first, second, _ = adapter.modules
    plan = plan_for(adapter, {first.name: keep_out(first.A)}, {second.name})
    (place / "plans").mkdir(mode=0o755)
    return place / "adapter", plan.as_json(), place / "plans" / plan_name(plan.adapter_digest)


@fuzz
@given(data=st.data())
def test_any_plan_is_obeyed_as_it_says_or_refused_and_never_makes_an_update_larger(planned, data):
    folder, valid, file = planned
    file.write_bytes(data.draw(plans(valid)))
    file.chmod(0o644)
    admission = admit(folder, "fuzzed", Policy(plans=file.parent), device="cpu")
    verdict = admission.verdict
    json.dumps(verdict.as_json())
    if verdict.decision == "rejected":
        assert verdict.reason.code == PlanInvalid.code, verdict.reason
        return
    assert verdict.selected_by == "plan"
    said = {module["name"]: module["action"] for module in json.loads(file.read_bytes())["modules"]}
    assert set(verdict.stripped) == {name for name, action in said.items() if action == "strip"}
    bent = {name for name, action in said.items() if action == "transform"}
    assert set(verdict.transformed) == bent
    own = load_safetensors(bytes(admission.adapter.copy.weights))
    new = load_safetensors(b"".join(map(bytes, admission.weights.chunks()))) if bent else own
    for module in admission.adapter.modules:
        B, A = (key for key in reversed(module.keys))
        assert torch.equal(own[A], new[A])
        before, after = ((X[B].double() @ X[A].double()).norm() for X in (own, new))
        assert after <= before * (1 + 2 * MAX_GROWTH)


@pytest.fixture(scope="module")
def referenced(tmp_path_factory):
    """A valid reference as tensors and plain data, an adapter for it, and a place to write."""
    place = tmp_path_factory.mktemp("referenced")
    file = small_reference(place)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[METADATA_KEY])
    adapter = read(small_adapter(place / "adapter"))
    return load_file(file), about, adapter, place / "fuzzed.safetensors"


@fuzz
@given(data=st.data())
def test_any_reference_is_refused_or_gives_scores_that_are_defined(referenced, data):
    tensors, about, adapter, file = referenced
    file.write_bytes(data.draw(references(tensors, about)))
    try:
        found = read_reference(file)
    except ReferenceInvalid:
        return
    modules = [m for m in adapter.modules if m.name in found.subspaces]
    modules = [m for m in modules if found.about.modules[m.name].shape == m.shape]
    updates = [(m.B, m.A, m.scaling) for m in modules]
    spaces = [found.subspaces[m.name] for m in modules]
    scores = alignment.safe_lora(updates, spaces)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert not alignment.splora(updates, spaces).isinf().any()
    assert all(0 <= space.captured <= 1.01 for space in spaces)


@pytest.fixture(scope="module")
def vouched(tmp_path_factory):
    """A signed and attested adapter, the keys of both, its signature and its attestation."""
    place = tmp_path_factory.mktemp("vouched")
    adapter = small_adapter(place / "adapter")
    pair = key_pair(place, "signer")
    sign(adapter, pair)
    policy = Policy(
        on_uninformative="admit",
        signatures={"require": True, "keys": [pair.public]},
        attestations={"require": True, "keys": [pair.public]},
    )
    _, envelope = attest_adapter(adapter, pair.key, policy, "cpu", name="fuzzed")
    bundle = json.loads((adapter / SIGNATURE).read_bytes())
    (adapter / policy.attestations.file).write_text(json.dumps(envelope))
    assert admit(adapter, "fuzzed", policy, device="cpu").verdict.reason is None
    return adapter, policy, pair, bundle, envelope


@fuzz
@given(data=st.data())
def test_any_signature_is_refused_or_signs_what_was_signed(vouched, data):
    adapter, policy, _, bundle, _ = vouched
    policy = policy.model_copy(update={"attestations": Policy().attestations})
    file = adapter / SIGNATURE
    file.write_bytes(data.draw(documents(bundle)))
    try:
        verdict = admit(adapter, "fuzzed", policy, device="cpu").verdict
        if verdict.reason is None:
            payload = json.loads(file.read_bytes())["dsseEnvelope"]["payload"]
            signed_payload = bundle["dsseEnvelope"]["payload"]
            assert base64.b64decode(payload) == base64.b64decode(signed_payload)
            assert verdict.signed_by is not None
        else:
            assert verdict.reason.code == "S3LORA-213", verdict.reason
    finally:
        file.write_text(json.dumps(bundle))


@fuzz
@given(data=st.data())
def test_any_attestation_is_refused_or_attests_what_was_attested(vouched, data):
    adapter, policy, _, _, envelope = vouched
    policy = policy.model_copy(update={"signatures": Policy().signatures})
    file = adapter / policy.attestations.file
    file.write_bytes(data.draw(documents(envelope)))
    verdict = admit(adapter, "fuzzed", policy, device="cpu").verdict
    if verdict.reason is None:
        payload = json.loads(file.read_bytes())["payload"]
        assert base64.b64decode(payload) == base64.b64decode(envelope["payload"])
        assert verdict.attested_by is not None
    else:
        assert verdict.reason.code == "S3LORA-217", verdict.reason


@fuzz
@given(data=st.data())
def test_any_statement_of_a_trusted_key_gets_a_verdict(vouched, data):
    """What a trusted scanner signs may be wrong, and is still no reason to fail."""
    adapter, policy, pair, _, envelope = vouched
    statement = json.loads(base64.b64decode(envelope["payload"]))
    changed = data.draw(changed_values(statement))
    own = {"signatures": Policy().signatures}
    if data.draw(st.booleans()):
        own["attestations"] = policy.attestations.model_copy(update={"trust_scores": True})
    policy = policy.model_copy(update=own)
    file = adapter / policy.attestations.file
    file.write_text(json.dumps(signed(json.dumps(changed).encode(), pair.key)))
    verdict = admit(adapter, "fuzzed", policy, device="cpu").verdict
    json.dumps(verdict.as_json(), allow_nan=False)
    if verdict.reason is not None:
        assert verdict.reason.code in rejection_codes()
        assert verdict.reason.code != GateFailed.code, verdict.reason
