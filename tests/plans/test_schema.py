"""A plan is what the schema says, or a refusal with its code; nothing else happens."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import PlanInvalid
from s3lora_serve.plans.file import plan_of
from s3lora_serve.plans.schema import ModulePlan, Plan, parse_plan

DIGEST = "sha256:" + "a" * 64
KEEP = {"name": "q_proj", "action": "keep", "rank": 2}
BENT = ModulePlan.of("q_proj", 2, torch.eye(2), 0.5).model_dump(mode="json")
PLAN = {"adapter_digest": DIGEST, "config_digest": DIGEST, "base_model": "m", "modules": [KEEP]}
KEYS = st.sampled_from([*Plan.model_fields, *ModulePlan.model_fields, "x", "ü", "value", "\ud800"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([DIGEST, "keep", "strip", "transform", "\ud800", 10**400, BENT["transform"]])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(JUNK)
def test_any_data_is_a_plan_or_a_refusal(data):
    try:
        plan = parse_plan(data, "drawn")
    except PlanInvalid as error:
        refusal = str(error)
        assert refusal.startswith("S3LORA-208: drawn: ")
    else:
        assert parse_plan(plan.as_json(), "again").digest == plan.digest


@given(st.dictionaries(KEYS, JUNK, max_size=3), st.dictionaries(KEYS, JUNK, max_size=2))
def test_a_plan_changed_anywhere_is_a_plan_or_a_refusal(top, inner):
    data = PLAN | {"modules": [BENT | inner]} | top
    try:
        plan = parse_plan(data, "drawn")
    except PlanInvalid:
        return
    assert plan_of(json.dumps(plan.as_json()).encode(), "again") == plan


@given(st.binary(max_size=60) | JUNK.map(lambda data: json.dumps(data).encode()))
def test_any_bytes_are_a_plan_or_a_refusal(text):
    try:
        plan_of(text, "drawn")
    except PlanInvalid as error:
        refusal = str(error)
        assert refusal.startswith("S3LORA-208: drawn")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"version": 1, "version": 1}', "given twice"),
        (b"[]", "plan"),
        (json.dumps(PLAN | {"version": 2}).encode(), "version"),
        (json.dumps(PLAN | {"surplus": 1}).encode(), "surplus"),
        (json.dumps(PLAN | {"modules": []}).encode(), "modules"),
        (json.dumps(PLAN | {"modules": [KEEP, KEEP]}).encode(), "named twice"),
        (json.dumps(PLAN | {"adapter_digest": "a" * 64}).encode(), "adapter_digest"),
        (json.dumps(PLAN | {"modules": [BENT | {"rank": 3}]}).encode(), "rank 3 takes 36"),
        (json.dumps(PLAN | {"modules": [BENT | {"action": "keep"}]}).encode(), "belongs to"),
        (json.dumps(PLAN | {"modules": [BENT | {"transform": "é"}]}).encode(), "base64"),
        (json.dumps(PLAN | {"modules": [KEEP | {"removed": 1.5}]}).encode(), "removed"),
    ],
)
def test_a_bad_plan_is_refused_by_name(text, words):
    with pytest.raises(PlanInvalid, match=words):
        plan_of(text, "a plan")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_transform_with_nan_or_inf_is_refused(value):
    with pytest.raises(ValueError, match="NaN or Inf"):
        ModulePlan.of("q_proj", 2, torch.full((2, 2), value), 0.0)


def test_a_transform_is_read_back_as_it_was_written():
    T = torch.tensor([[1.0, 2.0], [3.0, 4.5]])
    assert torch.equal(ModulePlan.of("q_proj", 2, T, 0.5).matrix(), T)
