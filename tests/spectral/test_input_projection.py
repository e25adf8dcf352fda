"""The low-rank input projection equals its dense float64 definition, and its figures hold."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import input_projection as projection
from s3lora_serve.spectral import projection_effects as effects
from s3lora_serve.spectral import projection_pairs as directions
from s3lora_serve.spectral import reference
from s3lora_serve.spectral.projection_pairs import projection_pairs
from tests.support.statistics import covariance

EPSILON = 0.1


def regularised(C_b):
    return C_b + EPSILON * C_b.trace() / len(C_b) * torch.eye(len(C_b)).double()


def pairs(n, rank, seed=0, dtype=torch.float64):
    C_h, C_b = covariance(n, seed), covariance(n, seed + 1)
    found = projection_pairs(C_h, C_b, rank=rank, epsilon=EPSILON, dtype=dtype)
    return C_h, regularised(C_b), found


@st.composite
def updates(draw):
    """One module's factors and scaling, and the width of its site."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(2, 24))
    r = draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 1000))
    numbers = torch.Generator().manual_seed(seed)
    scaling = draw(st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3))
    B, A = (torch.randn(*shape, generator=numbers).to(dtype) for shape in ((m, r), (r, n)))
    return B, A, scaling, seed


def coordinates(B, A, scaling, statistics):
    [found] = projection.coordinates([(B, A, scaling)], statistics)
    return found


def new_factor(A, found, lam):
    """A' unrounded: in the dtype of A it is rounded further."""
    return projection.projected([A.double()], [found], lam)[0].A


lambdas = st.floats(1e-4, 1e3)


@given(updates(), lambdas)
@settings(deadline=None, max_examples=40)
def test_with_all_pairs_it_is_the_least_squares_projection(update, lam):
    B, A, scaling, seed = update
    n = A.shape[1]
    C_h, C_b, (statistics, *_) = pairs(n, n, seed)
    found = coordinates(B, A, scaling, statistics)
    dense = reference.input_projection(B, A, scaling, C_h, C_b, lam)
    low_rank = scaling * B.double() @ new_factor(A, found, lam)
    size = float((scaling * B.double() @ A.double()).norm())
    assert float((low_rank - dense).norm()) <= 1e-6 * size
    before = scaling * B.double() @ A.double()
    F = statistics.F.double()  # totals on benign inputs are of C_b as far as F has it
    held = F @ F.mT + statistics.ridge * torch.eye(n).double()
    expected = effects.Effect(
        harmful_before=reference.energy(before, C_h),
        harmful_after=reference.energy(dense, C_h),
        benign_before=reference.energy(before, held),
        benign_lost=reference.energy(before - dense, C_b),
        beyond=0.0,
    )
    for name in effects.Effect.__dataclass_fields__:
        whole = expected.harmful_before if "harmful" in name else expected.benign_before
        value = getattr(effects.effects([found], lam)[0], name)
        assert value == pytest.approx(getattr(expected, name), abs=1e-6 * whole), name


@given(updates(), lambdas, st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_what_the_kept_pairs_leave_on_harmful_inputs_is_bounded(update, lam, rank, dtype):
    B, A, scaling, seed = update
    C_h, _C_b, (statistics, captured, _) = pairs(A.shape[1], rank, seed, dtype)
    found = coordinates(B, A, scaling, statistics)
    served = scaling * B.double() @ new_factor(A, found, lam)
    figures = effects.effects([found], lam)[0]
    # Rounding of V and U to bfloat16 moves each by 2^-9 of itself.
    slack = 1e-5 if dtype == torch.float32 else 0.05
    whole = reference.energy(scaling * B.double() @ A.double(), C_h)
    bound = figures.harmful_after + statistics.beyond * figures.benign_before
    assert reference.energy(served, C_h) <= bound + slack * whole
    assert 0 < captured <= 1 + slack
    assert figures.harmful_after <= figures.harmful_before * (1 + slack)


@given(st.integers(3, 24), st.integers(1, 8), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_no_projection_of_its_rank_costs_less_for_an_update_of_which_nothing_is_known(
    n, rank, seed
):
    C_h, C_b, (statistics, *_) = pairs(n, rank, seed)
    lam = directions.BALANCE
    R = statistics.U * (statistics.mu / (statistics.mu + lam)) @ statistics.V.mT
    M = torch.eye(n).double() - R
    cost = reference.energy(M, C_h) + lam * reference.energy(R, C_b)
    gains = torch.linalg.eigvalsh(C_h @ torch.linalg.solve(C_h + lam * C_b, C_h)).flip(0)
    least = float(C_h.trace() - gains[:rank].sum())
    assert cost == pytest.approx(least, rel=1e-6, abs=1e-9 * float(C_h.trace()))


@given(updates(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_the_effect_on_harmful_inputs_falls_with_lambda_and_what_is_kept_rises(update, dtype):
    B, A, scaling, seed = update
    _, _, (statistics, *_) = pairs(A.shape[1], 8, seed, dtype)
    found = coordinates(B, A, scaling, statistics)
    falling = [effects.effects([found], 10.0**exponent)[0] for exponent in range(-4, 5)]
    slack = 1e-6 if dtype == torch.float32 else 0.05
    for smaller, larger in itertools.pairwise(falling):
        assert smaller.residual <= larger.residual + slack
        assert smaller.kept <= larger.kept + slack
        assert smaller.lost >= larger.lost - slack


def some_modules(count=5, n=20):
    _, _, (statistics, *_) = pairs(n, 12)
    draw = torch.Generator().manual_seed(9)
    return [
        coordinates(
            torch.randn(16, 4, generator=draw), torch.randn(4, n, generator=draw), 2.0, statistics
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("wanted", [0.5, 0.2, 0.05, 0.01])
def test_the_lambda_found_is_the_largest_that_leaves_the_wanted_residual(wanted):
    modules = some_modules()
    lam = effects.largest_lambda(modules, lambda effect: effect.residual <= wanted)
    assert effects.total_effect(modules, lam).residual == pytest.approx(wanted, rel=1e-6)


def test_no_lambda_is_found_if_none_holds_and_the_largest_if_all_do():
    modules = some_modules()
    assert effects.largest_lambda(modules, lambda effect: effect.lost < 0) is None
    assert effects.largest_lambda(modules, lambda _: True) == pytest.approx(1e6)


def test_an_update_of_zero_has_no_effect():
    _, _, (statistics, *_) = pairs(8, 4)
    found = coordinates(torch.zeros(6, 2), torch.ones(2, 8), 1.0, statistics)
    figures = effects.effects([found], 0.1)[0]
    assert (figures.residual, figures.kept, figures.lost) == (0.0, 1.0, 0.0)


def test_wide_sites_get_the_same_pairs_from_the_randomised_method(monkeypatch):
    exact = pairs(96, 8)[2]
    monkeypatch.setattr("s3lora_serve.spectral.projection_pairs.EXACT", 16)
    found = pairs(96, 8)[2]
    assert torch.allclose(found.statistics.mu, exact.statistics.mu, rtol=1e-6)
    assert found.harmful_captured == pytest.approx(exact.harmful_captured, rel=1e-6)


@pytest.mark.parametrize("which", ["harmful", "benign"])
def test_covariances_of_nothing_are_refused(which):
    C = {"harmful": covariance(6, 0), "benign": covariance(6, 1), which: torch.zeros(6, 6).double()}
    with pytest.raises(ValueError, match=which):
        projection_pairs(C["harmful"], C["benign"], rank=2, epsilon=0.1, dtype=torch.float32)
