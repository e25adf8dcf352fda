"""A plan is obeyed for the adapter that it names, and for no other."""

import pytest
import torch

from s3lora_serve.errors import PlanInvalid
from s3lora_serve.plans.file import check_fits, find_plan, read_plan
from tests.support.plans import install, plan_for, read, small_adapter

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    return read(small_adapter(tmp_path / "adapter"))


@pytest.fixture
def plan(adapter):
    return plan_for(adapter, {NAME: torch.eye(4) / 2})


def test_an_installed_plan_is_found_and_fits(adapter, plan, tmp_path):
    file = install(plan, tmp_path / "plans")
    assert find_plan(tmp_path / "plans", adapter.copy.digest) == plan == read_plan(file)
    check_fits(plan, adapter)


def test_a_file_that_is_no_plan_is_refused_and_never_ignored(adapter, plan, tmp_path):
    install(plan, tmp_path / "plans").write_text("{}")
    with pytest.raises(PlanInvalid, match="adapter_digest"):
        find_plan(tmp_path / "plans", adapter.copy.digest)


def renamed(plan, **changes):
    first, *others = plan.modules
    return {"modules": (first.model_copy(update=changes), *others)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {"adapter_digest": "sha256:" + "0" * 64}, "adapter_digest is sha256:0000"),
        (lambda _: {"config_digest": "sha256:" + "0" * 64}, "config_digest is sha256:0000"),
        (lambda plan: renamed(plan, name="model.layers.9.mlp.up_proj"), "layers.9.* not have"),
        (lambda plan: {"modules": plan.modules[1:]}, f"lacks {NAME}"),
        (lambda plan: renamed(plan, rank=5), "rank 5, it has 4"),
    ],
)
def test_a_plan_for_another_adapter_is_refused(adapter, plan, change, words):
    with pytest.raises(PlanInvalid, match=words):
        check_fits(plan.model_copy(update=change(plan)), adapter)
