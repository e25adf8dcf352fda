"""Random modules for property tests."""

import torch
from hypothesis import strategies as st

from tests.support.factors import gaussian

EXPONENTS = {torch.bfloat16: 100, torch.float16: 4, torch.float32: 100, torch.float64: 220}
"""Powers of two that a factor of the dtype can be scaled by without losing digits."""


@st.composite
def modules(draw, route="precision", largest=220):
    """A module (B, A, scaling) of any shape, with dead rows, rows of any length, at any scale.

    For routes by Grams, of ranks that they vouch for. `largest` is the largest power of two in it.
    """
    ranks = [1, 2, 4, 8, 16, 32]
    r = draw(st.sampled_from(ranks[4:] if route == "float32 Grams" else ranks))
    least = {"float32 Grams": 12 * r, "float64 Grams": 4 * r}.get(route, 1)
    most_decades, most = (0, 24) if route == "float32 Grams" else (3, largest)
    lengths = [d for d in (1, 3, 7, 20, 60, 200, 400) if d >= least]
    m, n = (draw(st.sampled_from(lengths)) for _ in range(2))
    seed = draw(st.integers(0, 10**6))
    B, A = (factor[0] for factor in gaussian(m, n, r, k=1, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for lines in (B, A.mT):
        dead = torch.rand(len(lines), generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        lines[dead] = 0
        decades = draw(st.sampled_from([0, most_decades]))
        lines *= 10 ** (-decades * torch.rand(len(lines), 1, generator=generator).double())
    dtype = draw(st.sampled_from(list(EXPONENTS)))
    most = min(most, EXPONENTS[dtype])
    B, A = (
        torch.ldexp(factor, torch.tensor(draw(st.integers(-most, most)))).to(dtype)
        for factor in (B, A)
    )
    return B, A, draw(st.sampled_from([1.0, 0.5, -3.0, 64.0, 1e-6]))
