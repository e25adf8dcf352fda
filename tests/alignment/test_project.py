"""Projected modules hold B' = C·B, computed in float64 and rounded once; all else stays."""

import numpy
import pytest
import torch

from s3lora_serve.adapter.safetensors_format import read_header, tensors
from s3lora_serve.alignment.project import projected_weights
from s3lora_serve.alignment.reference_file import read_reference
from s3lora_serve.errors import ReferenceUnfit
from s3lora_serve.spectral import alignment
from tests.support.adapters import key, q_proj, write_adapter
from tests.support.plans import read, small_adapter
from tests.support.references import small_reference

FIRST, SECOND = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return read_reference(small_reference(tmp_path_factory.mktemp("reference")))


def _tensors(weights):
    data = memoryview(bytearray(b"".join(map(bytes, weights.chunks()))))
    return dict(tensors(read_header(data), data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_module_is_c_times_b_and_the_other_bytes_stay(tmp_path, reference, dtype):
    adapter = read(small_adapter(tmp_path / "adapter", dtype))
    found = _tensors(projected_weights(adapter, reference, {FIRST}))
    [module] = [m for m in adapter.modules if m.name == FIRST]
    space = reference.subspaces[FIRST]
    U = space.U.double()
    C = (U * space.singular_values.square()) @ U.T / space.frobenius
    expected = (C @ module.B.double()).to(dtype)
    assert torch.allclose(found[key(FIRST, "B")].double(), expected.double(), rtol=1e-2, atol=1e-6)
    if dtype == torch.float32:
        assert torch.equal(found[key(FIRST, "B")], expected)
    own = dict(tensors(adapter.header, adapter.copy.weights))
    for name in own.keys() - {key(FIRST, "B")}:
        assert torch.equal(found[name], own[name])


def test_projecting_keeps_the_share_that_the_score_says(tmp_path, reference):
    adapter = read(small_adapter(tmp_path / "adapter"))
    found = _tensors(projected_weights(adapter, reference, {FIRST, SECOND}))
    for module in adapter.modules[:2]:
        update = (module.B, module.A, module.scaling)
        products = alignment.products([update], [reference.subspaces[module.name]])
        dense = found[key(module.name, "B")].double() @ module.A.double()
        share = (dense.norm() / (module.B.double() @ module.A.double()).norm()) ** 2
        assert float(share) == pytest.approx(float(products.image / products.own), rel=1e-5)


def test_projection_out_of_the_range_of_its_dtype_is_refused(tmp_path, reference):
    B, A = torch.full((24, 4), 60000.0), torch.randn(4, 16)
    tensor = {name: t.half() for name, t in q_proj(0, B, A).items()}
    space = reference.subspaces[FIRST]
    gain = float(space.singular_values[0]) ** 2 / space.frobenius
    assert gain > 1.2  # along the first direction the update grows
    tensor[key(FIRST, "B")] = (
        (space.U[:, :1] * 60000 / space.U[:, 0].abs().max()).half().repeat(1, 4)
    )
    adapter = read(write_adapter(tmp_path / "adapter", tensor))
    with pytest.raises(ReferenceUnfit, match="NaN or Inf"):
        projected_weights(adapter, reference, {FIRST})
    assert numpy.isfinite(gain)
