"""The kernels compile for GPUs that are not here, with the oldest Triton and the pinned one."""

import pytest

from tests.runs.gpu.kernels import compiled
from tests.runs.gpu.oldest_triton import oldest_triton

pytest.importorskip("triton", reason="needs Triton, whose wheel has ptxas")

ARCHITECTURES = (80, 90, 100)
MOST_STACK = 256
"""Bytes of a thread that do not fit into registers: read and written a few times a kernel."""

MOST_STACK_SM_100 = 8192
"""With Triton 3.6 and r > 32: its way around an instruction without float64 has too few registers.
What is slow there is right all the same."""


@pytest.fixture(params=[pytest.param("oldest", marks=pytest.mark.slow), "pinned"])  # it is fetched
def triton(request):
    """The folder of a Triton; None: the pinned one, which is installed."""
    return oldest_triton() if request.param == "oldest" else None


def check(found, triton, count):
    assert len(found) == count
    assert [one for one in found if "failed" in one] == []
    assert [one for one in found if one["tf32"]] == []
    assert {one["architecture"] for one in found} == set(ARCHITECTURES)
    for one in found:
        spills = triton is not None and one["architecture"] >= 100 and one["rank"] > 32
        assert one["stack_bytes"] <= (MOST_STACK_SM_100 if spills else MOST_STACK), one


def test_each_kernel_compiles_without_tf32_and_within_the_registers(triton):
    found = compiled(triton, "--ranks", "16", "--dtypes", "bfloat16", "--layouts", "columns")
    check(found, triton, 4 * len(ARCHITECTURES))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_kernel_compiles_for_all_ranks_dtypes_and_layouts(triton):
    found = compiled(triton)
    check(found, triton, 3 * len(ARCHITECTURES) * (2 + 2 * 3 * 2))
