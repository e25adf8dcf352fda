"""Gates against dense float64: what is removed, and that nothing is added."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.adapter.reader import Module
from s3lora_serve.lab.calibration.gate_families import Gates, OpenOrShutGates, SubspaceGates
from s3lora_serve.lab.calibration.gates import GatedLinear, thin_svd, transform


def _module(m: int, n: int, r: int, seed: int, scaling: float = 2.0) -> Module:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, n, generator=draw), torch.randn(m, r, generator=draw)
    return Module("layers.0.q_proj", A, B, scaling, ("a", "b"))


CPU = torch.device("cpu")


def _gates(by, ranks) -> Gates:
    return SubspaceGates(ranks, CPU) if by == "subspace" else OpenOrShutGates(by, ranks, CPU)


def _gate(k: int, seed: int) -> torch.Tensor:
    gates = SubspaceGates([k], CPU)
    draw = torch.Generator().manual_seed(seed)
    gates.restore({str(k): torch.randn(1, k, k, generator=draw)})
    return gates.matrices()[0].detach()


shapes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(1, 14), st.integers(0, 99))


@given(shapes)
def test_transform_gives_the_gated_update_of_the_dense_reference(shape):
    m, n, r, seed = shape
    module = _module(m, n, r, seed)
    U, S, V = thin_svd(module)
    gate = _gate(len(S), seed)
    dense = U @ gate.double() @ torch.diag(S) @ V.T
    served = module.B.double() @ transform(module, gate) @ module.A.double()
    assert torch.allclose(served, dense, atol=1e-9 * float(S[0]))


@given(shapes, st.integers(0, 99))
def test_gated_update_is_at_most_as_long_for_every_input(shape, draw):
    m, n, r, seed = shape
    module = _module(m, n, r, seed)
    T = transform(module, _gate(len(thin_svd(module)[1]), seed))
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(draw)).double()
    before = module.B.double() @ (module.A.double() @ x)
    after = module.B.double() @ T @ (module.A.double() @ x)
    assert (after.norm(dim=0) <= before.norm(dim=0) * (1 + 1e-9)).all()


@pytest.mark.parametrize("by", ["subspace", "component", "module"])
def test_strength_zero_keeps_the_adapter_whole(by):
    gates = _gates(by, [4, 4, 8])
    for matrix, rank in zip(gates.matrices(0.0), [4, 4, 8], strict=True):
        assert torch.equal(matrix.detach(), torch.eye(rank))


def test_more_strength_removes_more():
    gates = SubspaceGates([6], CPU)
    shares = [
        float(1 - gates.matrices(c)[0].detach().norm() ** 2 / 6) for c in (0.0, 0.5, 1.0, 4.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


@pytest.mark.parametrize("by", ["component", "module"])
def test_gates_of_components_and_modules_are_0_or_1(by):
    gates = OpenOrShutGates(by, [4], CPU)
    gates.restore({"4": torch.tensor([[-1.0, 1.0, -0.5, 2.0]])})
    found = set(gates.matrices()[0].diagonal().detach().round(decimals=6).tolist())
    assert found == ({0.0, 1.0} if by == "component" else {1.0})


def test_gated_layer_without_a_gate_is_the_lora_layer():
    module = _module(6, 5, 3, 0)
    linear = torch.nn.Linear(5, 6, bias=False)
    layer = GatedLinear(linear, module, torch.float32)
    x = torch.randn(4, 5)
    expected = linear(x) + module.scaling * x @ module.A.T @ module.B.T
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_rank_over_the_shape_and_a_zero_module_have_transforms():
    for module in (
        _module(3, 2, 7, 0),
        Module("q", torch.ones(2, 4), torch.zeros(5, 2), 1.0, ("a", "b")),
    ):
        S = thin_svd(module)[1]
        T = transform(module, _gate(len(S), 0))
        assert T.shape == (module.rank, module.rank)
        assert T.isfinite().all()
