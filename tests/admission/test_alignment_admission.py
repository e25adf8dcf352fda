"""Alignment scorers at admission: the least aligned modules are stripped or projected."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve import Policy
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.decision import decide
from s3lora_serve.admission.scoring import check_reference
from s3lora_serve.alignment.reference_file import read_reference
from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.file import with_options
from s3lora_serve.policy.file_digests import with_file_digests
from s3lora_serve.policy.method import ScorerChoice
from s3lora_serve.policy.reload import ReloadablePolicy
from s3lora_serve.policy.schema import parse_policy
from s3lora_serve.settings import Settings
from s3lora_serve.spectral import ModuleScore
from tests.support.references import small_reference, wide_adapter

COUNT = 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return small_reference(tmp_path_factory.mktemp("reference"), layers=COUNT)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return wide_adapter(tmp_path_factory.mktemp("adapters") / "wide", COUNT)


def policy_with(reference, scorer="safe-lora", **keys):
    data = {"scorer": {"name": scorer, "reference": str(reference)}, **keys}
    return with_file_digests(parse_policy(data, "policy"))


@pytest.mark.parametrize("scorer", ["safe-lora", "splora"])
@pytest.mark.parametrize("strip", [{"top_k": 3}, {"fraction": 0.25}])
def test_least_aligned_modules_are_stripped(reference, adapter, scorer, strip):
    verdict = admit(adapter, "a", policy_with(reference, scorer, strip=strip)).verdict
    ranked = sorted(verdict.modules, key=lambda module: module.alignment)
    assert set(verdict.stripped) == {module.name for module in ranked[:3]}
    assert verdict.decision == "stripped"


@pytest.mark.parametrize("scorer", ["safe-lora", "splora"])
def test_threshold_strips_what_is_at_it_or_under_it(reference, adapter, scorer):
    scored = admit(adapter, "a", policy_with(reference, scorer)).verdict
    bound = sorted(module.alignment for module in scored.modules)[4]
    verdict = admit(
        adapter, "a", policy_with(reference, scorer, strip={"threshold": bound})
    ).verdict
    at_most = {module.name for module in scored.modules if module.alignment <= bound}
    assert set(verdict.stripped) == at_most
    assert len(at_most) == 5


def test_too_many_modules_under_the_threshold_refuse_the_adapter(reference, adapter):
    verdict = admit(adapter, "a", policy_with(reference, strip={"threshold": 1.0})).verdict
    assert verdict.reason.code == "S3LORA-203"
    assert "under the threshold" in verdict.reason.message


def test_verdict_names_reference_captured_energy_and_sharpness(reference, adapter):
    policy = policy_with(reference)
    verdict = admit(adapter, "a", policy).verdict
    digest = read_reference(reference).digest
    assert verdict.scorer["parameters"]["reference_digest"] == digest
    for module in verdict.modules:
        assert 0 < module.captured <= 1
        assert 0 <= module.alignment <= 1
        assert module.ssi is not None


def test_reference_is_part_of_the_policy_digest(reference, tmp_path):
    other = small_reference(tmp_path, rank=5)
    copy = tmp_path / "copy"
    copy.write_bytes(reference.read_bytes())
    choice = ScorerChoice(name="safe-lora", reference=reference)
    one, two = (with_file_digests(Policy(scorer=choice)) for _ in range(2))
    assert one.digest == two.digest
    assert policy_with(other).digest != policy_with(reference).digest


@pytest.mark.parametrize("layers", [COUNT - 1])
def test_module_that_the_reference_lacks_refuses_the_adapter(adapter, tmp_path, layers):
    policy = policy_with(small_reference(tmp_path, layers=layers))
    verdict = admit(adapter, "a", policy).verdict
    assert verdict.reason.code == "S3LORA-209"
    assert f"layers.{layers}.self_attn.q_proj" in verdict.reason.message


def test_module_of_another_shape_refuses_the_adapter(adapter, tmp_path):
    verdict = admit(
        adapter, "a", policy_with(small_reference(tmp_path, m=32, layers=COUNT))
    ).verdict
    assert verdict.reason.code == "S3LORA-209"
    assert "holds as 32 x 16" in verdict.reason.message


def test_modules_that_the_policy_leaves_out_need_no_reference(adapter, tmp_path):
    policy = policy_with(
        small_reference(tmp_path, layers=3),
        modules=[f"*layers.{i}.*" for i in range(3)],
        strip={"top_k": 1},
    )
    verdict = admit(adapter, "a", policy).verdict
    assert verdict.decision == "stripped"


def test_reference_that_was_exchanged_after_the_policy_was_read_admits_nothing(adapter, tmp_path):
    file = small_reference(tmp_path, layers=COUNT)
    policy = policy_with(file)
    small_reference(tmp_path / "new", layers=COUNT, rank=3).rename(file)
    verdict = admit(adapter, "a", policy).verdict
    assert verdict.decision == "rejected"
    assert verdict.reason.code == "S3LORA-401"
    with pytest.raises(PolicyInvalid, match="was expected"):
        check_reference(policy)


def test_policy_may_pin_the_reference_by_its_digest(reference):
    digest = read_reference(reference).digest
    scorer = {"name": "safe-lora", "reference": str(reference), "reference_digest": digest}
    assert with_file_digests(parse_policy({"scorer": scorer}, "p")).scorer.reference_digest
    scorer["reference_digest"] = "sha256:" + "0" * 64
    with pytest.raises(PolicyInvalid, match="the policy says"):
        with_file_digests(parse_policy({"scorer": scorer}, "p"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"scorer": {"name": "safe-lora"}}, "needs reference"),
        ({"scorer": {"reference_digest": "sha256:" + "0" * 64}}, "which is not set"),
        ({"action": "project"}, "needs scorer.name safe-lora"),
        ({"action": "project", "scorer": {"name": "splora", "reference": "r"}}, "safe-lora"),
        ({"strip": {"threshold": 1.5}}, r"outside of \[0, 1\]"),
        (
            {"strip": {"threshold": -1}, "scorer": {"name": "safe-lora", "reference": "r"}},
            "outside",
        ),
        ({"scorer": {"name": "splora"}}, "needs reference"),
        ({"rules": [{"match": {}, "scorer": {"reference": "r"}}]}, "cannot be set by a rule"),
    ],
)
def test_policy_that_cannot_work_is_refused(data, said):
    with pytest.raises(PolicyInvalid, match=said):
        parse_policy(data, "policy")


def test_splora_takes_any_threshold_and_rules_may_choose_the_scorer(reference):
    policy = policy_with(
        reference,
        "splora",
        strip={"threshold": -2.5},
        rules=[{"match": {"adapter": "x"}, "scorer": {"name": "safe-lora"}, "strip": {"top_k": 1}}],
    )
    ruled = policy.for_adapter("x", "", None)
    assert ruled.scorer.name == "safe-lora"
    assert ruled.scorer.reference_digest == policy.scorer.reference_digest


def test_projection_serves_other_bytes_and_says_what_it_removes(reference, adapter, tmp_path):
    policy = policy_with(reference, action="project", strip={"top_k": 4})
    folders = iter([tmp_path / "copy"])

    def into():
        folder = next(folders, tmp_path / "copy")
        folder.mkdir(exist_ok=True)
        return folder

    admission = admit(adapter, "a", policy, into=into)
    verdict = admission.verdict
    assert (len(verdict.projected), verdict.stripped) == (4, ())
    assert verdict.decision == "stripped"
    assert verdict.served_digest == admission.weights.digest() != verdict.digest
    assert all(m.removed_share < 1 for m in verdict.modules if m.projected)
    assert (tmp_path / "copy" / "own" / "adapter_model.safetensors").exists()


def test_options_of_a_command_replace_the_policys(reference):
    policy = with_options(Policy(), "safe-lora", reference, "project")
    assert policy.scorer.reference_digest == read_reference(reference).digest
    assert with_options(Policy()) == Policy()
    with pytest.raises(PolicyInvalid, match="needs reference"):
        with_options(Policy(), "splora")


def _score(place, value):
    return ModuleScore(
        f"m{place:02}", True, 0.5, 0.4, (1.0,), 1.0, 1.0, 1.0, 2.0,
        None if math.isnan(value) else value, 0.25, 0.9,
    )  # fmt: skip


@given(
    st.lists(st.floats(0, 1) | st.just(math.nan), min_size=2, max_size=30), st.integers(0, 30),
    st.sampled_from(["strip", "project"]),
)  # fmt: skip
def test_no_module_is_changed_while_a_less_aligned_one_is_kept(values, top_k, action):
    scorer = ScorerChoice(name="safe-lora", reference="r")
    policy = Policy(scorer=scorer, strip={"top_k": top_k}, action=action, on_uninformative="admit")
    scores = [_score(place, value) for place, value in enumerate(values)]
    outcome = decide(scores, {}, "sha256:" + "0" * 64, policy)
    changed = outcome.stripped | set(outcome.projected)
    aligned = {s.name: s.alignment for s in scores if s.alignment is not None}
    kept = [value for name, value in aligned.items() if name not in changed]
    picked = [value for name, value in aligned.items() if name in changed]
    assert len(picked) <= top_k
    assert not kept or not picked or max(picked) <= min(kept) + 1e-8
    assert changed <= aligned.keys()


def test_changed_policy_with_a_bad_reference_leaves_the_one_in_force(reference, tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text(f"scorer: {{name: safe-lora, reference: {reference}}}\n")
    policy = ReloadablePolicy(Settings(policy=file), check_reference)
    before = policy.current
    other = small_reference(tmp_path / "other", rank=3)
    other.chmod(0o666)
    file.write_text(f"scorer: {{name: safe-lora, reference: {other}}}\n...\n")
    with pytest.raises(PolicyInvalid, match="can be written by others"):
        policy.reload()
    assert policy.current is before
    other.chmod(0o644)
    assert policy.reload().scorer.reference == other
