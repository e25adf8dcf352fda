"""Repair's factors are what their dense float64 definition says, and its figures hold."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import dense_reference
from s3lora_serve.spectral import factor_coordinates as coordinates
from s3lora_serve.spectral import input_directions as directions
from s3lora_serve.spectral import repair_effects as effects
from s3lora_serve.spectral.input_directions import input_directions
from s3lora_serve.spectral.output_directions import output_directions
from s3lora_serve.spectral.two_sided import STEPS
from tests.support.statistics import covariance

EPSILON = 0.1


def regularised(C_b):
    return C_b + EPSILON * C_b.trace() / len(C_b) * torch.eye(len(C_b)).double()


def inputs(n, rank, seed=0, dtype=torch.float64):
    C_h, C_b = covariance(n, seed), covariance(n, seed + 1)
    return (
        C_h,
        regularised(C_b),
        input_directions(C_h, C_b, rank=rank, epsilon=EPSILON, dtype=dtype),
    )


def outputs(m, rank, seed=0, dtype=torch.float64):
    """G with mean eigenvalue 1 and an eigenvalue of at least 0.1, and its directions."""
    G = covariance(m, seed + 2)
    G = G * m / G.trace() + 0.1 * torch.eye(m).double()
    return G * m / G.trace(), output_directions(G, rank=rank, dtype=dtype)


@st.composite
def updates(draw):
    """One module's factors and scaling, and a seed for the statistics around it."""
    m, n = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    r = draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 1000))
    numbers = torch.Generator().manual_seed(seed)
    scaling = draw(st.floats(-8, 8).filter(lambda s: abs(s) > 1e-3))
    B, A = (torch.randn(*shape, generator=numbers).to(dtype) for shape in ((m, r), (r, n)))
    return B, A, scaling, seed


lambdas = st.floats(1e-3, 1e2)


def found_of(B, A, scaling, own_inputs, own_outputs):
    [found] = coordinates.coordinates([(B, A, scaling)], own_inputs, [own_outputs])
    return found


def new_update(B, A, scaling, found, factors):
    """ΔW' unrounded: in the dtypes of B and A it is rounded further."""
    new = coordinates.new_factors([(B.double(), A.double())], [found], [factors])[0]
    return scaling * new.B @ new.A


def complete(update):
    """The dense metrics around an update, and its coordinates in all directions."""
    B, A, scaling, seed = update
    C_h, C_b, (own_inputs, *_) = inputs(A.shape[1], A.shape[1], seed)
    G, (own_outputs, _) = outputs(len(B), len(B), seed)
    return C_h, C_b, G, found_of(B, A, scaling, own_inputs, own_outputs)


def solved(found, lam, steps=STEPS):
    [stack] = effects._stacks({"module": found})
    factors = stack.surroundings.repaired(lam, steps)
    return type(factors)(*(each[0] for each in factors)), stack.effects(factors)[0]


@given(updates(), lambdas, st.sampled_from(["a", "b", "ba", "bab"]))
@settings(deadline=None, max_examples=25)
def test_each_step_is_the_minimum_over_its_factor(update, lam, steps):
    B, A, scaling, _ = update
    C_h, C_b, G, found = complete(update)
    factors, _ = solved(found, lam, steps)
    new = coordinates.new_factors([(B.double(), A.double())], [found], [factors])[0]
    whole = scaling * B.double() @ A.double()
    made, held = (new.A, new.B) if steps[-1] == "a" else (new.B, new.A)
    made = made.clone().requires_grad_()
    product = held @ made if steps[-1] == "a" else made @ held
    loss = dense_reference.repair_loss(whole, scaling * product, C_h, C_b, G, lam)
    [slope] = torch.autograd.grad(loss, [made])
    # No further step along the slope gains: a parabola falls by slope²/(2·curvature).
    change = held @ slope if steps[-1] == "a" else slope @ held
    curvature = dense_reference.repair_loss(0 * whole, scaling * change, C_h, C_b, G, lam)
    gain = float(slope.square().sum()) ** 2 / (4 * float(curvature)) if curvature > 0 else 0.0
    start = float(dense_reference.repair_loss(whole, whole, C_h, C_b, G, lam))
    assert gain <= 1e-6 * start


@given(updates(), lambdas)
@settings(deadline=None, max_examples=25)
def test_no_step_increases_the_loss(update, lam):
    B, A, scaling, _ = update
    C_h, C_b, G, found = complete(update)
    whole = scaling * B.double() @ A.double()
    losses = []
    for count in range(len(STEPS) + 1):
        new = new_update(B, A, scaling, found, solved(found, lam, STEPS[:count])[0])
        losses.append(float(dense_reference.repair_loss(whole, new, C_h, C_b, G, lam)))
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-6)


@given(updates(), lambdas)
@settings(deadline=None, max_examples=25)
def test_with_all_directions_the_figures_are_those_of_the_dense_update(update, lam):
    B, A, scaling, _ = update
    C_h, C_b, G, found = complete(update)
    factors, said = solved(found, lam)
    whole = scaling * B.double() @ A.double()
    new = new_update(B, A, scaling, found, factors)
    expected = effects.Effect(
        harmful_before=float((G @ whole @ C_h * whole).sum()),
        harmful_after=float((G @ new @ C_h * new).sum()),
        benign_before=dense_reference.energy(whole, C_b),
        benign_lost=dense_reference.energy(whole - new, C_b),
        beyond=0.0,
    )
    for name in effects.Effect.__dataclass_fields__:
        size = expected.harmful_before if "harmful" in name else expected.benign_before
        assert getattr(said, name) == pytest.approx(getattr(expected, name), abs=1e-6 * size), name


@given(updates(), lambdas)
@settings(deadline=None, max_examples=25)
def test_if_all_outputs_weigh_alike_it_is_the_least_squares_projection_of_the_inputs(update, lam):
    B, A, scaling, seed = update
    C_h, C_b, (own_inputs, *_) = inputs(A.shape[1], A.shape[1], seed)
    alike = output_directions(torch.eye(len(B)).double(), rank=1, dtype=torch.float64).statistics
    found = found_of(B, A, scaling, own_inputs, alike)
    new = new_update(B, A, scaling, found, solved(found, lam, "a")[0])
    dense = dense_reference.input_projection(B, A, scaling, C_h, C_b, lam)
    size = float((scaling * B.double() @ A.double()).norm())
    assert float((new - dense).norm()) <= 1e-6 * size


@given(updates(), lambdas, st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=25)
def test_with_some_directions_less_is_left_and_the_factors_are_those_of_the_figures(
    update, lam, rank, dtype
):
    B, A, scaling, seed = update
    _, _, (own_inputs, *_) = inputs(A.shape[1], rank, seed, dtype)
    _, (own_outputs, _) = outputs(len(B), rank, seed, dtype)
    found = found_of(B, A, scaling, own_inputs, own_outputs)
    factors, said = solved(found, lam)
    # Rounding of directions to bfloat16 moves each by 2^-9 of itself.
    slack = 1e-5 if dtype == torch.float32 else 0.05
    assert said.harmful_after <= said.harmful_before * (1 + slack)
    new = coordinates.new_factors([(B.double(), A.double())], [found], [factors])[0]
    again = found_of(new.B, new.A, scaling, own_inputs, own_outputs)
    assert torch.allclose(again.P, factors.P, atol=slack * float(found.P.norm()))
    assert torch.allclose(again.S, factors.S, atol=slack * float(found.S.norm()))


@given(st.integers(3, 24), st.integers(1, 8), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_no_projection_of_its_rank_costs_less_for_an_update_of_which_nothing_is_known(
    n, rank, seed
):
    C_h, C_b, (statistics, *_) = inputs(n, rank, seed)
    lam = directions.BALANCE
    R = statistics.U * (statistics.mu / (statistics.mu + lam)) @ statistics.V.mT
    M = torch.eye(n).double() - R
    cost = dense_reference.energy(M, C_h) + lam * dense_reference.energy(R, C_b)
    gains = torch.linalg.eigvalsh(C_h @ torch.linalg.solve(C_h + lam * C_b, C_h)).flip(0)
    least = float(C_h.trace() - gains[:rank].sum())
    assert cost == pytest.approx(least, rel=1e-6, abs=1e-9 * float(C_h.trace()))


def some_modules(count=5, m=16, n=20):
    _, _, (own_inputs, *_) = inputs(n, 12)
    _, (own_outputs, _) = outputs(m, 8)
    draw = torch.Generator().manual_seed(9)
    return {
        str(i): found_of(
            torch.randn(m, 4, generator=draw),
            torch.randn(4, n, generator=draw),
            2.0,
            own_inputs,
            own_outputs,
        )
        for i in range(count)
    }


def test_less_is_left_and_less_is_kept_the_smaller_lambda():
    modules = some_modules()
    falling = [effects.solution(modules, 10.0**exponent).effect for exponent in range(-5, 4)]
    for smaller, larger in itertools.pairwise(falling):
        assert smaller.residual < larger.residual
        assert smaller.kept < larger.kept


def test_lambda_is_that_which_is_asked_for_unless_it_leaves_more_than_is_wanted():
    modules = some_modules()
    enough = effects.largest_solution(modules, 0.1, most=math.inf)
    assert enough.lam == 0.1
    left = enough.effect.harmful_after
    for share in (0.9, 0.3, 1e-4):
        stricter = effects.largest_solution(modules, 0.1, most=share * left)
        assert stricter.lam < 0.1
        assert 0.3 * share * left < stricter.effect.harmful_after <= share * left
    assert effects.largest_solution(modules, 0.1, most=0.0) is None


def test_modules_are_solved_alike_alone_and_together():
    modules = some_modules(40)
    together = effects.solution(modules, 0.1)
    for name, found in modules.items():
        alone = effects.solution({name: found}, 0.1)
        assert alone.effects[name].residual == pytest.approx(together.effects[name].residual)


def test_an_update_of_zero_has_no_effect():
    _, _, (own_inputs, *_) = inputs(8, 4)
    _, (own_outputs, _) = outputs(6, 4)
    found = found_of(torch.zeros(6, 2), torch.ones(2, 8), 1.0, own_inputs, own_outputs)
    assert not found.acts
    _, figures = solved(found, 0.1)
    assert (figures.residual, figures.kept, figures.lost) == (0.0, 1.0, 0.0)


def test_wide_sites_get_the_same_pairs_from_the_randomised_method(monkeypatch):
    exact = inputs(96, 8)[2]
    monkeypatch.setattr("s3lora_serve.spectral.leading_subspace.EXACT", 16)
    found = inputs(96, 8)[2]
    assert torch.allclose(found.statistics.mu, exact.statistics.mu, rtol=1e-6)
    assert found.harmful_captured == pytest.approx(exact.harmful_captured, rel=1e-6)


@pytest.mark.parametrize("which", ["harmful", "benign"])
def test_covariances_of_nothing_are_refused(which):
    C = {"harmful": covariance(6, 0), "benign": covariance(6, 1), which: torch.zeros(6, 6).double()}
    with pytest.raises(ValueError, match=which):
        input_directions(C["harmful"], C["benign"], rank=2, epsilon=0.1, dtype=torch.float32)


def test_gradients_of_nothing_are_refused():
    with pytest.raises(ValueError, match="gradients"):
        output_directions(torch.zeros(6, 6).double(), rank=2, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(5))
def test_a_large_lambda_leaves_the_factors_themselves(seed):
    draw = torch.Generator().manual_seed(seed)
    B, A = torch.randn(16, 4, generator=draw).double(), torch.randn(4, 20, generator=draw).double()
    _, _, _, found = complete((B, A, 2.0, seed))
    factors, _ = solved(found, 1e9)
    [new] = coordinates.new_factors([(B, A)], [found], [factors])
    assert torch.allclose(new.B, B, atol=1e-5)
    assert torch.allclose(new.A, A, atol=1e-5)
