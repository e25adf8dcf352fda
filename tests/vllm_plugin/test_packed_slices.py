"""Which slices of a packed layer are computed."""

import math
from itertools import pairwise, product

import pytest
import torch

from s3lora_serve.vllm_plugin.engine.packed_slices import runs, weights_given

A, B = torch.ones(2, 5), torch.ones(3, 2)
ZERO = torch.zeros(3, 2)
LAST_NONZERO = torch.zeros(3, 2)
LAST_NONZERO[2, 1] = 1e-30


@pytest.mark.parametrize(
    ("lora_a", "lora_b", "slices", "expected"),
    [
        (A, B, 1, [True]),
        (A, ZERO, 1, [False]),
        (A, LAST_NONZERO, 1, [True]),
        (A, ZERO * math.nan, 1, [True]),
        (torch.zeros(2, 5), B, 1, [False]),
        ([A, None, A], [B, None, B], 3, [True, False, True]),
        ([A, A, A], [B, ZERO, LAST_NONZERO], 3, [True, False, True]),
        ([None, None], [None, None], 2, [False, False]),
        (A, B, 3, [True, True, True]),
        (A, ZERO, 3, [False, False, False]),
        ([A, None], [B, None], 4, [True] * 4),
        (A, [B, ZERO], 2, [True, True]),
        ([A], [ZERO, ZERO], 2, [True, True]),
    ],
)
def test_slices_have_weights_where_both_factors_do_and_where_it_is_not_known(
    lora_a, lora_b, slices, expected
):
    assert weights_given(lora_a, lora_b, slices) == expected


@pytest.mark.parametrize("in_one_call", [False, True])
@pytest.mark.parametrize(
    "needed", [list(n) for k in range(1, 5) for n in product((0, 1), repeat=k)]
)
def test_runs_cover_what_is_needed_once_and_begin_and_end_there(needed, in_one_call):
    found = list(runs(needed, in_one_call=in_one_call))
    covered = [i for first, end in found for i in range(first, end)]
    assert len(covered) == len(set(covered))
    assert {i for i, one in enumerate(needed) if one} <= set(covered)
    for first, end in found:
        assert needed[first]
        assert needed[end - 1]
    if in_one_call:
        assert len(found) <= 1
    else:
        assert all(needed[i] for i in covered)
        gaps = [two[0] - one[1] for one, two in pairwise(found)]
        assert all(gap > 0 for gap in gaps)
