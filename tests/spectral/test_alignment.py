"""Low-rank alignment scores equal their dense float64 references, and behave as defined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import alignment, dense_reference
from s3lora_serve.spectral.alignment import FEWEST_SAMPLES, Subspace
from s3lora_serve.spectral.leading_subspace import leading_subspace
from s3lora_serve.spectral.rotations import frame_blocks


def subspace(m, n, k, seed=0, dtype=torch.float64, decay=0.7):
    """The leading k directions of a random V with a falling spectrum."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, min(m, n), generator=draw).double()).Q
    values = 3 * decay ** torch.arange(min(m, n)).double()
    U = left[:, :k].to(dtype)
    gram = U.double().mT @ U.double()
    return Subspace(U, values[:k], float(values.norm()), gram)


def update(m, n, r, seed=0, dtype=torch.float32, scaling=2.0):
    draw = torch.Generator().manual_seed(1000 + seed)
    return (
        torch.randn(m, r, generator=draw).to(dtype),
        torch.randn(r, n, generator=draw).to(dtype),
        scaling,
    )


@st.composite
def batches(draw):
    """Modules of a few shapes and dtypes, with their subspaces."""
    modules, subspaces = [], []
    shapes = draw(st.lists(st.tuples(st.integers(2, 24), st.integers(2, 24)), min_size=1))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    for seed, (m, n) in enumerate(shapes):
        r, k = draw(st.integers(1, 12)), draw(st.integers(1, min(m, n)))
        scaling = draw(st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3))
        modules.append(update(m, n, r, seed, draw(dtypes), scaling))
        subspaces.append(subspace(m, n, k, seed))
    return modules, subspaces


@given(batches())
@settings(deadline=None)
def test_safe_lora_equals_its_dense_reference(batch):
    found, dense = alignment.safe_lora(*batch), dense_reference.safe_lora(*batch)
    assert torch.allclose(found, dense, atol=1e-6, rtol=0, equal_nan=True)
    assert ((found >= 0) & (found <= 1)).all()


@given(batches())
@settings(deadline=None, max_examples=30)
def test_splora_equals_its_dense_reference(batch):
    found, dense = alignment.splora(*batch), dense_reference.splora(*batch)
    assert torch.allclose(found, dense, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["safe_lora", "splora"])
def test_rounded_directions_and_large_shapes_agree_with_the_dense_reference(name, dtype):
    shapes = [(96, 64)] * (FEWEST_SAMPLES + 2) + [(64, 96)] * 3
    modules = [update(m, n, 8, i, torch.bfloat16) for i, (m, n) in enumerate(shapes)]
    subspaces = [subspace(m, n, 16, i, dtype) for i, (m, n) in enumerate(shapes)]
    found = getattr(alignment, name)(modules, subspaces)
    dense = getattr(dense_reference, name)(modules, subspaces)
    assert torch.allclose(found, dense, atol=1e-6, rtol=1e-6)


def test_update_within_the_leading_direction_is_aligned_and_one_outside_is_not():
    space = subspace(32, 24, 4)
    A = torch.randn(2, 24)
    inside = (space.U[:, :1] @ torch.ones(1, 2).double(), A, 1.0)
    outside_U = torch.linalg.qr(space.U, mode="complete").Q[:, 4:6]
    outside = (outside_U, A, 1.0)
    found = alignment.safe_lora([inside, outside], [space, space])
    assert found[0] == pytest.approx(1.0)
    assert found[1] == pytest.approx(0.0, abs=1e-7)


def test_zero_and_non_finite_updates_have_no_score():
    space = subspace(16, 12, 4)
    B, A, s = update(16, 12, 3)
    broken = B.clone()
    broken[0, 0] = torch.nan
    modules = [(B * 0, A, s), (broken, A, s), (B, A, s)]
    for score in (alignment.safe_lora, alignment.splora):
        found = score(modules, [space] * 3)
        assert found.isnan().tolist() == [True, True, False]


def test_scores_do_not_depend_on_the_other_modules_order():
    modules = [update(24, 24, 4, i) for i in range(FEWEST_SAMPLES + 3)]
    spaces = [subspace(24, 24, 6, i) for i in range(FEWEST_SAMPLES + 3)]
    forward = alignment.splora(modules, spaces)
    backward = alignment.splora(modules[::-1], spaces[::-1]).flip(0)
    assert torch.allclose(forward, backward)


def test_process_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    alignment.splora([update(40, 24, 4)], [subspace(40, 24, 6)])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("m", "k", "r"), [(64, 8, 4), (10, 8, 4), (8, 8, 4), (2000, 32, 16)])
def test_frame_blocks_have_the_second_moments_of_uniform_frames(m, k, r):
    blocks = frame_blocks(m, k, r)
    assert (torch.linalg.matrix_norm(blocks, ord=2) <= 1 + 1e-9).all()
    # E‖UᵀF‖_F² = k·r/m for a uniformly distributed frame F of r columns.
    energies = blocks.square().sum((1, 2))
    error = energies.std() / len(energies) ** 0.5
    assert float(energies.mean()) == pytest.approx(k * r / m, abs=float(5 * error) + 1e-9)


@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None)
def test_truncation_bounds_the_error_of_the_cosine_and_of_the_distance(m, n, k, seed):
    whole, cut = (subspace(m, n, min(rank, m, n), seed) for rank in (99, k))
    module = update(m, n, 3, seed)
    exact, kept = (alignment.products([module], [space]) for space in (whole, cut))
    size = kept.own.sqrt()
    bound = 2 * cut.truncation * size / kept.image.sqrt()
    assert (alignment.cosines(exact) - alignment.cosines(kept)).abs() <= bound + 1e-9
    change = (alignment.distance(exact) - alignment.distance(kept)).abs()
    assert change <= cut.truncation * size + 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_leading_subspace_captures_the_energy_of_the_best(exact):
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 200, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(200, 200, generator=draw)).Q
    values = 0.97 ** torch.arange(200)
    U, found = leading_subspace(left * values @ right.mT, 32, exact=exact)
    assert torch.allclose(U.mT @ U, torch.eye(32), atol=1e-5)
    assert float(found.square().sum()) >= 0.999 * float(values[:32].square().sum())
    assert float(found.square().sum()) <= 1.00001 * float(values[:32].square().sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["safe_lora", "splora"])
def test_cuda_gives_the_scores_of_the_cpu(name):
    modules = [update(96, 64, 8, i, torch.bfloat16) for i in range(12)]
    subspaces = [subspace(96, 64, 16, i, torch.bfloat16) for i in range(12)]
    score = getattr(alignment, name)
    on_device = score(modules, subspaces, device="cuda")
    assert torch.allclose(on_device, score(modules, subspaces), atol=1e-9)
