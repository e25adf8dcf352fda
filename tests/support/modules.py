"""Random modules for property tests."""

import torch
from hypothesis import strategies as st

from tests.support.factors import gaussian

EXPONENTS = {torch.bfloat16: 100, torch.float16: 4, torch.float32: 100, torch.float64: 220}
"""Largest power of two by which a factor of the dtype can be scaled without losing digits."""


@st.composite
def modules(draw, route="precision", largest=220):
    """A module (B, A, scaling) of any shape and scale, with zero rows and rows of any norm.

    For the Gram routes, shapes and ranks are limited to those whose error bound they accept.
    `largest` is the largest power of two by which a factor is scaled.
    """
    ranks = [1, 2, 4, 8, 16, 32]
    r = draw(st.sampled_from(ranks[4:] if route == "float32 Grams" else ranks))
    least = {"float32 Grams": 12 * r, "float64 Grams": 4 * r}.get(route, 1)
    max_decades, max_exponent = (0, 24) if route == "float32 Grams" else (3, largest)
    lengths = [d for d in (1, 3, 7, 20, 60, 200, 400) if d >= least]
    m, n = (draw(st.sampled_from(lengths)) for _ in range(2))
    seed = draw(st.integers(0, 10**6))
    B, A = (factor[0] for factor in gaussian(m, n, r, k=1, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for rows in (B, A.mT):
        zero = torch.rand(len(rows), generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        rows[zero] = 0
        decades = draw(st.sampled_from([0, max_decades]))
        rows *= 10 ** (-decades * torch.rand(len(rows), 1, generator=generator).double())
    dtype = draw(st.sampled_from(list(EXPONENTS)))
    limit = min(max_exponent, EXPONENTS[dtype])
    B, A = (
        torch.ldexp(factor, torch.tensor(draw(st.integers(-limit, limit)))).to(dtype)
        for factor in (B, A)
    )
    return B, A, draw(st.sampled_from([1.0, 0.5, -3.0, 64.0, 1e-6]))
