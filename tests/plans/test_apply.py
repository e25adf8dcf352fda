"""Transformed weights are B·T of the dense reference, change nothing else, and never grow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from s3lora_serve.adapter.private_copy import CONFIG_NAME, OWN_FOLDER, WEIGHTS_NAME
from s3lora_serve.errors import PlanInvalid
from s3lora_serve.plans.apply import MAX_GROWTH, transformed_weights
from tests.support.adapters import key, q_proj, write_adapter
from tests.support.plans import keep_out, plan_for, read, small_adapter

NAME = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.1.self_attn.q_proj"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def file_of(weights):
    return b"".join(bytes(chunk) for chunk in weights.chunks())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_factors_are_the_dense_product_in_the_adapters_own_dtype(tmp_path, dtype):
    adapter = read(small_adapter(tmp_path / "adapter", dtype))
    transforms = {m.name: keep_out(m.A, 2) for m in adapter.modules if m.name != OTHER}
    plan = plan_for(adapter, transforms)
    weights = transformed_weights(adapter, plan)
    before, after = load(bytes(adapter.copy.weights)), load(file_of(weights))
    assert before.keys() == after.keys()
    for name in transforms:
        B = before[key(name, "B")].double()
        T = next(module for module in plan.modules if module.name == name).matrix().double()
        assert torch.equal(after.pop(key(name, "B")), (B @ T).to(dtype))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(0, 4),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_removing_directions_never_grows_an_update_and_changes_no_other_byte(
    tmp_path_factory, dtype, count, seed, scale
):
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        B, A = torch.randn(9, 4, generator=random), torch.randn(4, 7, generator=random)
        tensors |= q_proj(layer, (scale * B).to(dtype), A.to(dtype))
    adapter = read(write_adapter(tmp_path_factory.mktemp("drawn") / "adapter", tensors))
    module = next(module for module in adapter.modules if module.name == NAME)
    weights = transformed_weights(adapter, plan_for(adapter, {NAME: keep_out(module.A, count)}))
    new, own = file_of(weights), bytes(adapter.copy.weights)
    assert len(new) == len(own)
    entry = next(e for e in adapter.header.entries if e.name == key(NAME, "B"))
    assert new[: entry.start] == own[: entry.start]
    assert new[entry.end :] == own[entry.end :]
    A, B, changed = (X.double() for X in (module.A, module.B, load(new)[key(NAME, "B")]))
    assert (changed @ A).norm() <= (B @ A).norm() * (1 + MAX_GROWTH)
    # Removed is removed: what is left of the directions is the rounding of the dtype.
    V = torch.linalg.svd(A, full_matrices=False)[2][:count].T
    rounding = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # T is float32
    assert (changed @ A @ V).norm() <= rounding * B.norm() * A.norm() + 1e-6 * B.norm() * A.norm()


@pytest.mark.parametrize("transform", [1.01 * torch.eye(4), -2 * torch.eye(4), 1e30 * torch.eye(4)])
def test_a_transform_that_makes_an_update_larger_is_refused(tmp_path, transform):
    adapter = read(small_adapter(tmp_path / "adapter"))
    with pytest.raises(PlanInvalid, match="may not increase"):
        transformed_weights(adapter, plan_for(adapter, {NAME: transform}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transform_beyond_the_dtype_is_refused(tmp_path, dtype):
    tensors = q_proj(0, torch.full((6, 4), 100.0, dtype=dtype), torch.ones(4, 5, dtype=dtype))
    adapter = read(write_adapter(tmp_path / "adapter", tensors))
    with pytest.raises(PlanInvalid, match="NaN or Inf"):
        transformed_weights(adapter, plan_for(adapter, {NAME: 3e38 * torch.eye(4)}))


def test_factors_that_are_huge_and_cancel_are_refused(tmp_path):
    """B' is served in the engine's dtype, whose rounding would be larger than the update."""
    A = torch.ones(4, 5)
    adapter = read(write_adapter(tmp_path / "adapter", q_proj(0, torch.randn(6, 4), A)))
    T = torch.zeros(4, 4)
    T[:, 0], T[:, 1] = 1e6, -1e6
    with pytest.raises(PlanInvalid, match="cancel"):
        transformed_weights(adapter, plan_for(adapter, {NAME: T}))


def test_the_transform_of_a_module_without_effect_leaves_it_so(tmp_path):
    tensors = q_proj(0, torch.zeros(6, 4), torch.ones(4, 5)) | q_proj(
        1, torch.ones(6, 4), torch.ones(4, 5)
    )
    adapter = read(write_adapter(tmp_path / "adapter", tensors))
    weights = transformed_weights(adapter, plan_for(adapter, {NAME: 5 * torch.eye(4)}))
    assert file_of(weights) == bytes(adapter.copy.weights)
    assert weights.digest() == adapter.copy.digest


def test_a_plan_without_transforms_has_no_weights_of_its_own(tmp_path):
    adapter = read(small_adapter(tmp_path / "adapter"))
    assert transformed_weights(adapter, plan_for(adapter, strip={NAME})) is None


def test_written_weights_replace_the_copys_and_keep_the_adapters_own_beside_them(tmp_path):
    adapter = read(small_adapter(tmp_path / "adapter"))
    folder = small_adapter(tmp_path / "copy")
    weights = transformed_weights(adapter, plan_for(adapter, {NAME: torch.eye(4) / 2}))
    weights.write_into(folder)
    assert (folder / WEIGHTS_NAME).read_bytes() == file_of(weights)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        own = (folder / OWN_FOLDER / name).read_bytes()
        assert own == (tmp_path / "adapter" / name).read_bytes()


def test_a_deadline_stops_a_plan_between_modules(tmp_path):
    adapter = read(small_adapter(tmp_path / "adapter"))
    plan = plan_for(adapter, {NAME: torch.eye(4) / 2})

    def passed():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        transformed_weights(adapter, plan, passed)
