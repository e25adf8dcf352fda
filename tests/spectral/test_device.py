"""Scoring on an accelerator: on a GPU if there is one, else in Triton's interpreter."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s3lora_serve.spectral import dense_reference, gram, precision, qr, spectral_sharpness
from s3lora_serve.spectral import device as devices
from s3lora_serve.spectral.panels import HostModules
from s3lora_serve.spectral.upload import upload
from tests.spectral.test_low_rank import ACCURACY, assert_same_index
from tests.spectral.test_switch import FAMILIES
from tests.support.factors import HARD, gaussian
from tests.support.triton_interpreter import patch_once_a_launch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu:0"
"""`cpu` means the host. `cpu:0` counts as a device: the interpreter runs the kernels, and copies
are ordinary copies."""

pytest.importorskip("triton", reason="kernels need Triton, which torch brings on Linux")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Set the variable before the import: Triton reads it when a kernel is defined."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
            patch_once_a_launch(patch)
        from s3lora_serve.spectral import triton_chain, triton_passes

        yield triton_passes, triton_chain


def index(solution):
    return spectral_sharpness(solution.normalised)


def on_device(modules):
    [found] = devices.solve(modules, DEVICE, lambda: None)
    return found


def pairs(B, A, dtype=torch.bfloat16):
    return [(b.to(dtype), a.to(dtype)) for b, a in zip(B, A, strict=True)]


@pytest.mark.parametrize(
    ("m", "n", "r", "dtype"),
    [(300, 70, 8, torch.float32), (257, 90, 16, torch.bfloat16), (70, 64, 33, torch.float16)],
    ids=str,
)
def test_a_device_gives_what_the_host_gives_in_float64(m, n, r, dtype):
    modules = pairs(*gaussian(m, n, r, k=1 if r > 32 else 2), dtype)
    modules[0] = modules[0][0].mT.contiguous().mT, modules[0][1].mT.contiguous().mT
    modules[-1][0][0] = 0
    found = on_device(modules)
    assert all(
        torch.equal(one, other) for one, other in zip(found, on_device(modules), strict=True)
    ), "results depend on the order of execution"
    sides = HostModules(modules).sides(range(len(modules)), torch.float64)
    for one, other in zip(found, gram.solve(*sides, "two_sided"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_rows_that_are_lost_leave_a_module_to_the_host():
    B, A = gaussian(200, 90, 16, k=2)
    B[0, 7] = 1e-160  # its square is no number of float64
    B[1, 7] = 0.0
    found = on_device(list(zip(B, A, strict=True)))
    assert found.error_bound[0] == torch.inf
    assert found.error_bound[1] < 1e-6


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("case", [case for case in HARD if case not in ("no modules", "rank 256")])
def test_index_on_a_device_is_within_the_promised_accuracy(case, dtype):
    B, A = (factor[:1].to(dtype) for factor in HARD[case]())
    found = precision.solve(list(zip(B, A, strict=True)), "two_sided", device=DEVICE)
    count = min(*B.shape[1:], A.shape[-1])
    exact = dense_reference.mas_svd(B, A, torch.ones(len(B)))
    expected = spectral_sharpness(exact.singular_values)
    assert_same_index(spectral_sharpness(found.normalised[:, :count]), expected)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(FAMILIES), decades=st.floats(0, 6), seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), rank=st.sampled_from([4, 16]),
)  # fmt: skip
def test_no_error_on_a_device_exceeds_its_error_bound(family, decades, seed, dtype, rank):
    B, A = (X.to(dtype) for X in family(*gaussian(300, 200, rank, k=1, seed=seed), decades))
    found = on_device(list(zip(B, A, strict=True)))
    error = (index(found) - index(qr.solve(B.double(), A.double(), "two_sided"))).abs()
    assert (error.nan_to_num() <= found.error_bound + 1e-12).all(), (error, found.error_bound)


def test_device_and_host_rank_alike_wherever_the_gap_exceeds_their_accuracy():
    B, A = gaussian(200, 150, 16, k=5)
    B[:, :, 0] *= torch.linspace(1.0, 3.0, 5, dtype=torch.float64)[:, None]
    modules = pairs(B, A)
    host, device = (index(precision.solve(modules, "two_sided", device=d)) for d in ("cpu", DEVICE))
    order = host.argsort()
    assert (device[order].diff()[host[order].diff() > 2 * ACCURACY] > 0).all()


def test_equal_eigenvalues_beside_a_sharp_one_are_exact():
    """Rows that repeat the identity, and rows along one direction: P·Q is αI + β·uuᵀ."""
    identity, direction = torch.eye(16), torch.full((100, 16), 0.25)
    B = torch.cat([*[identity] * 8, direction]).bfloat16()
    A = torch.cat([identity] * 4, 1).bfloat16()
    found = on_device([(B, A)])
    exact = qr.solve(B[None].double(), A[None].double(), "two_sided")
    assert abs(float(index(found) - index(exact))) <= 1e-12
    assert float(found.error_bound) < 1e-6


def mixed_modules():
    """Modules of one rank with several shapes, dtypes and layouts, in no particular order."""
    made = []
    for i, (m, n) in enumerate([(40, 30), (30, 40), (64, 20), (1, 90)]):
        B, A = gaussian(m, n, 16, k=1, seed=i)
        dtype = (torch.bfloat16, torch.float32, torch.float16)[i % 3]
        made.append((B[0].to(dtype), A[0].to(dtype)))
    made.append((made[0][0].mT.contiguous().mT, made[0][1].mT.contiguous().mT))
    made.append((made[1][0][::2], made[1][1][:, 3:17]))
    return made


@pytest.mark.parametrize("part_bytes", [1, 40_000, 2**28])
def test_parts_change_neither_scores_nor_their_order(monkeypatch, part_bytes):
    expected = precision.solve(mixed_modules(), "two_sided")
    monkeypatch.setattr(devices, "PART_BYTES", part_bytes)
    found = precision.solve(mixed_modules(), "two_sided", device=DEVICE)
    assert_same_index(index(found), index(expected))
    for name in ("row_mean", "column_mean", "frobenius", "factors"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0.0
        )


def test_a_module_larger_than_a_part_is_scored_on_the_host(monkeypatch):
    [small], [large] = pairs(*gaussian(20, 20, 16, k=1)), pairs(*gaussian(400, 200, 16, k=1))
    monkeypatch.setattr(devices, "PART_BYTES", devices.cost(large) - 1)
    assert [len(part) for part in devices.parts([small, large, small])] == [1, 1, 1]
    first, second = devices.solve([small, large], DEVICE, lambda: None)
    assert (first.error_bound < 1e-6).all()
    assert (second.error_bound == torch.inf).all()


@pytest.mark.parametrize(
    ("factor", "normalization"),
    [(torch.ones(80, 65), "two_sided"), (torch.ones(80, 16), "row"),
     (torch.ones(80, 16, dtype=torch.float8_e4m3fn), "two_sided")],
    ids=["rank 65", "row", "float8"],
)  # fmt: skip
def test_what_the_kernels_do_not_have_is_scored_on_the_host(factor, normalization):
    assert not devices.fits([(factor, factor.mT)], normalization)
    assert devices.fits([(torch.ones(80, 64), torch.ones(64, 80))], "two_sided")


def factors_of_one_file(count):
    """Factors of r = 8 that lie in one buffer with gaps between them."""
    buffer = torch.arange(count * 200, dtype=torch.float32).sin()
    return [
        (buffer[at + 10 : at + 90].view(10, 8), buffer[at + 100 : at + 180].view(8, 10))
        for at in range(0, len(buffer), 200)
    ]


def test_factors_of_one_file_are_uploaded_as_they_lie_there():
    modules = factors_of_one_file(3)
    found = upload(modules, torch.device(DEVICE), lambda: None)
    first = modules[0][0]
    start = first.storage_offset() * 4 // 16 * 16
    whole = first.untyped_storage()[start : len(found.memory) + start]
    assert found.memory.cpu().tolist() == list(whole)
    apart = [(B.clone(), A.clone()) for B, A in modules]
    assert torch.equal(on_device(modules).normalised, on_device(apart).normalised)


class Operations(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.seen[operation.overloadpacket.__name__] += 1
        return operation(*arguments, **(keywords or {}))


LAUNCHES = 6
MOST_OPERATIONS = 40
"""Of torch, for an adapter in one file, host and device together: the way before took 890 on the
device alone, and 24 waits, for an 8B model's 224 modules."""


def test_an_adapter_takes_six_launches_a_few_operations_and_one_wait(monkeypatch, kernels):
    """Whatever its number of modules: 224 here, in one file."""
    launches = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launches.append((self.name, grid))

    for module, names in zip(
        kernels, (("gram", "normalised_gram"), ("factorise", "spectrum")), strict=True
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(name))
    modules = factors_of_one_file(224)
    with Operations() as operations:
        on_device(modules)
    assert len(launches) == LAUNCHES
    assert [name for name, _ in launches[::2]] == ["gram", "factorise", "normalised_gram"]
    # One copy of the weights into pinned memory, one from there, and one of the table.
    assert operations.seen["copy_"] == 2
    assert sum(operations.seen.values()) <= MOST_OPERATIONS, operations.seen
    # What reads a value on the host waits for the device; the copy back of the results is alone.
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(operations.seen)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device: the bound is on its memory")
def test_device_memory_stays_bounded():
    torch.cuda.reset_peak_memory_stats()
    B, A = gaussian(4096, 4096, 64, k=1)
    modules = [(B[0].bfloat16().clone(), A[0].bfloat16().clone()) for _ in range(400)]
    precision.solve(modules, "two_sided", device=DEVICE)
    assert torch.cuda.max_memory_allocated() <= 1.25 * devices.PART_BYTES
