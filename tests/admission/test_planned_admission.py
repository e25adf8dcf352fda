"""A plan chooses in the place of the index; every other rule holds with it as without."""

import json

import pytest
import torch

from s3lora_serve import Policy
from s3lora_serve.adapter.private_copy import CONFIG_NAME, OWN_FOLDER, WEIGHTS_NAME
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.admission.verdict import Verdict, differs
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from tests.support.adapters import copy_with, diverged
from tests.support.plans import install, keep_out, plan_for, read, small_adapter

FIRST, SECOND, THIRD = (f"model.layers.{layer}.self_attn.q_proj" for layer in range(3))


@pytest.fixture
def folder(tmp_path):
    return small_adapter(tmp_path / "adapter")


@pytest.fixture
def plan(folder):
    A = {module.name: module.A for module in read(folder).modules}
    return plan_for(read(folder), {FIRST: keep_out(A[FIRST])}, strip={SECOND})


@pytest.fixture
def plans(tmp_path, plan):
    install(plan, tmp_path / "plans")
    return tmp_path / "plans"


def verdict_on(folder, plans=None, **policy):
    return admit(folder, "tenant", Policy(plans=plans, **policy), device="cpu").verdict


def test_a_plan_says_what_is_stripped_and_transformed(folder, plans, plan):
    verdict = verdict_on(folder, plans)
    assert (verdict.decision, verdict.selected_by) == ("stripped", "plan")
    assert verdict.plan_digest == plan.digest
    assert (verdict.transformed, verdict.stripped) == ((FIRST,), (SECOND,))
    shares = {module.name: module.removed_share for module in verdict.modules}
    assert shares == {FIRST: 0.25, SECOND: 1.0, THIRD: 0.0}
    assert all(module.ssi is not None for module in verdict.modules)
    assert verdict.served_digest not in (None, verdict.digest)
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict


def test_a_plan_that_keeps_all_admits(folder, tmp_path):
    install(plan_for(read(folder)), tmp_path / "plans")
    verdict = verdict_on(folder, tmp_path / "plans")
    assert (verdict.decision, verdict.selected_by) == ("admitted", "plan")
    assert verdict.served_digest == verdict.digest


def test_without_a_plan_the_index_chooses(folder, plans, tmp_path):
    other = small_adapter(tmp_path / "other", layers=4)
    verdict = verdict_on(other, plans, strip=Strip(top_k=1))
    assert (verdict.selected_by, verdict.plan_digest) == ("index", None)
    assert len(verdict.stripped) == 1
    assert verdict.served_digest == verdict.digest
    [stripped] = [module for module in verdict.modules if module.stripped]
    assert stripped.removed_share == 1.0


def test_the_index_refuses_no_adapter_with_a_plan(folder, plans, tmp_path):
    sharp = {"strip": Strip(threshold=0.0), "limits": Limits(max_stripped_fraction=0.1)}
    assert verdict_on(folder, **sharp).reason.code == "S3LORA-203"
    assert verdict_on(folder, plans, **sharp).decision == "stripped"
    single = small_adapter(tmp_path / "single", layers=1)
    assert verdict_on(single).reason.code == "S3LORA-205"
    install(plan_for(read(single), strip={FIRST}), plans)
    assert verdict_on(single, plans).stripped == (FIRST,)


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"limits": Limits(max_scaling=0.5)}, "S3LORA-201"),
        ({"limits": Limits(max_norm_ratio=0.01)}, "S3LORA-201"),
        ({"limits": Limits(max_rank=2)}, "S3LORA-201"),
        ({"limits": Limits(seconds=1e-9)}, "S3LORA-402"),
        ({"modules": ("k_proj",)}, "S3LORA-206"),
        ({"deny": "its digest"}, "S3LORA-202"),
    ],
)
def test_every_limit_holds_with_a_plan_and_also_where_the_plan_is_bad(folder, plans, policy, code):
    if "deny" in policy:
        policy = {"deny": [read(folder).copy.digest]}
    for contents in (None, "{}"):
        if contents:
            next(plans.iterdir()).write_text(contents)
        verdict = verdict_on(folder, plans, **policy)
        assert verdict.reason.code == code
        assert (verdict.served_digest, verdict.transformed) == (None, ())


def test_a_hostile_file_is_refused_before_any_plan_is_read(trained, plans, tmp_path):
    bad = copy_with(trained, tmp_path / "bad", diverged)
    assert verdict_on(bad, plans).reason.code == "S3LORA-109"


def test_an_allowed_digest_is_admitted_unstripped_whatever_its_plan(folder, plans, plan):
    allow = [{"digest": plan.adapter_digest, "config_digest": plan.config_digest}]
    for contents in (None, "{}"):
        if contents:
            next(plans.iterdir()).write_text(contents)
        verdict = verdict_on(folder, plans, allow=allow)
        assert (verdict.decision, verdict.selected_by) == ("admitted", "index")
        assert verdict.served_digest == verdict.digest
    assert verdict_on(folder, plans, allow=allow, require_plan=True).decision == "admitted"


def test_an_adapter_without_a_plan_is_refused_where_one_is_required(folder, plans, tmp_path):
    other = small_adapter(tmp_path / "other", layers=4)
    assert verdict_on(other, plans, require_plan=True).reason.code == "S3LORA-207"
    assert verdict_on(folder, plans, require_plan=True).decision == "stripped"


def test_a_rule_may_require_a_plan(tmp_path, plans):
    other = small_adapter(tmp_path / "other", layers=4)
    for name, code in (("tenant", "S3LORA-207"), ("other", None)):
        rule = {"match": {"adapter": name}, "require_plan": True}
        verdict = verdict_on(other, plans, rules=[rule], strip=Strip(top_k=1))
        assert (verdict.reason and verdict.reason.code) == code


@pytest.mark.parametrize("how", ["not JSON", "other config", "writable", "increase", "lacks one"])
def test_a_bad_plan_refuses_and_is_never_ignored(folder, plans, plan, how):
    file = next(plans.iterdir())
    if how == "not JSON":
        file.write_text("{")
    elif how == "writable":
        file.chmod(0o666)
    elif how == "other config":
        install(plan.model_copy(update={"config_digest": "sha256:" + "0" * 64}), plans)
    elif how == "increase":
        install(plan_for(read(folder), {FIRST: 2 * torch.eye(4)}), plans)
    else:
        install(plan.model_copy(update={"modules": plan.modules[:1]}), plans)
    verdict = verdict_on(folder, plans)
    assert verdict.reason.code == "S3LORA-208"
    assert (verdict.stripped, verdict.transformed, verdict.served_digest) == ((), (), None)
    assert (verdict.plan_digest is None) == (how in ("not JSON", "writable"))


def test_in_enforce_mode_the_private_copy_holds_the_transformed_bytes(folder, plans, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    admission = admit(folder, "tenant", Policy(plans=plans), device="cpu", into=lambda: private)
    served = b"".join(map(bytes, admission.weights.chunks()))
    assert (private / WEIGHTS_NAME).read_bytes() == served
    own = private / OWN_FOLDER
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (own / name).read_bytes() == (folder / name).read_bytes()


def test_in_audit_mode_the_private_copy_is_the_adapters_own(folder, plans, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    policy = Policy(plans=plans, mode="audit")
    verdict = admit(folder, "tenant", policy, device="cpu", into=lambda: private).verdict
    assert (verdict.decision, verdict.transformed) == ("stripped", (FIRST,))
    assert verdict.served_digest == verdict.digest
    assert (private / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    assert not (private / OWN_FOLDER).exists()


def test_a_given_plan_replaces_the_one_in_the_folder(folder, plans):
    given = plan_for(read(folder), strip={THIRD})
    admission = admit(
        folder, "tenant", Policy(plans=plans), device="cpu", circumstances=Circumstances(plan=given)
    )
    assert admission.verdict.stripped == (THIRD,)
    assert admission.verdict.plan_digest == given.digest


def test_another_policy_on_the_same_scores_is_the_indexs_word(folder, plans):
    policy = Policy(plans=plans, require_plan=True)
    under = admit(folder, "tenant", policy, device="cpu").under(
        policy.model_copy(update={"strip": Strip(top_k=1)})
    )
    assert (under.selected_by, under.plan_digest, under.transformed) == ("index", None, ())
    assert len(under.stripped) == 1


def test_verdicts_differ_where_a_plan_appeared_changed_or_vanished(folder, plans, plan):
    with_plan, without = verdict_on(folder, plans), verdict_on(folder)
    noted = plan.model_copy(update={"seed": 3})  # the same modules
    install(noted, plans)
    changed = verdict_on(folder, plans)
    assert with_plan.served_digest == changed.served_digest
    for before, after in ((with_plan, without), (without, with_plan), (with_plan, changed)):
        assert differs(before, after)
    assert not differs(with_plan, with_plan)


def test_a_verdict_written_before_there_were_plans_is_still_read(folder):
    data = verdict_on(folder, strip=Strip(top_k=1)).as_json()
    for key in ("selected_by", "plan_digest", "served_digest"):
        del data[key]
    for module in data["modules"]:
        del module["transformed"], module["removed_share"]
    assert Verdict.from_json(data).selected_by == "index"
