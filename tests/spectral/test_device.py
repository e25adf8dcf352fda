"""Scoring on an accelerator: on a GPU if there is one, else in Triton's interpreter."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3lora_serve.spectral import (
    device as devices,
)
from s3lora_serve.spectral import (
    gram,
    precision,
    qr,
    reference,
    spectral_sharpness,
    torch_ops,
)
from s3lora_serve.spectral._checks import NORMALIZATIONS
from s3lora_serve.spectral.panels import HostModules
from tests.spectral.test_low_rank import ACCURACY, assert_same_index
from tests.spectral.test_switch import FAMILIES
from tests.support.factors import HARD, gaussian

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
        from s3lora_serve.spectral import triton_ops

        yield triton_ops


def index(solution):
    return spectral_sharpness(solution.normalised)


def on_device(modules):
    pairs = list(modules)
    return devices.DeviceModules([(B.to(DEVICE), A.to(DEVICE)) for B, A in pairs])


@pytest.mark.parametrize("name", ["gram", "normalised_gram"])
def test_kernels_and_their_twins_in_torch_share_name_and_signature(kernels, name):
    kernel, twin = getattr(kernels, name), getattr(torch_ops, name)
    assert inspect.signature(kernel) == inspect.signature(twin)


@pytest.mark.parametrize("work", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("d", "r"), [(1, 1), (300, 8), (257, 16), (130, 33), (70, 64)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_kernels_give_what_torch_gives(kernels, d, r, dtype, work, layout):
    X = gaussian(d, 1, r, k=3)[0].to(dtype).to(DEVICE)
    X[0, 0] = 0
    X = X.mT.contiguous().mT if layout == "columns" else X
    lower = torch.linalg.cholesky(torch_ops.gram(gaussian(r + 9, 1, r, k=3)[0], torch.float64))
    lower = lower.to(work).to(DEVICE)
    close = (
        {"rtol": 1e-12, "atol": 1e-12} if work == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    found, expected = kernels.gram(X, work), torch_ops.gram(X, work)
    torch.testing.assert_close(found / d, expected / d, **close)
    assert torch.equal(kernels.gram(X, work), found), "sums depend on the order of execution"
    for one, other in zip(
        kernels.normalised_gram(X, lower), torch_ops.normalised_gram(X, lower), strict=True
    ):
        torch.testing.assert_close(one / d, other / d, **close)


def test_rows_that_are_lost_are_counted_alike(kernels):
    X = gaussian(200, 1, 16, k=2)[0].float().to(DEVICE)
    X[0, 7], X[1, :3], X[1, 9] = 1e-30, 1e-25, 0.0
    lower = torch.eye(16, device=DEVICE).expand(2, 16, 16)
    lost = kernels.normalised_gram(X, lower)[2]
    assert lost.tolist() == torch_ops.normalised_gram(X, lower)[2].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("dtype", "normalization"),
    [
        (torch.bfloat16, "two_sided"),
        (torch.float16, "two_sided"),
        (torch.float32, "two_sided"),
        (torch.bfloat16, "equilibrated"),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [case for case in HARD if case != "no modules"])
def test_index_on_a_device_is_within_the_promised_accuracy(case, dtype, normalization):
    B, A = (factor.to(dtype) for factor in HARD[case]())
    found = precision.solve(list(zip(B, A, strict=True)), normalization, device=DEVICE)
    count = min(*B.shape[1:], A.shape[-1])
    exact = reference.mas_svd(B, A, torch.ones(len(B)), normalization=normalization)
    expected = spectral_sharpness(exact.singular_values)
    assert_same_index(spectral_sharpness(found.normalised[:, :count]), expected)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(FAMILIES), decades=st.floats(0, 6), seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    normalization=st.sampled_from(NORMALIZATIONS), rank=st.sampled_from([4, 16, 33]),
    work=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_no_error_on_a_device_exceeds_its_error_bound(
    family, decades, seed, dtype, normalization, rank, work
):
    B, A = (X.to(dtype) for X in family(*gaussian(300, 200, rank, k=2, seed=seed), decades))
    sides = on_device(zip(B, A, strict=True)).sides([0, 1], work)
    found = precision._to_host(gram.solve(*sides, normalization))
    exact = qr.solve(B.double(), A.double(), normalization)
    error = (index(found) - index(exact)).abs()
    assert (error.nan_to_num() <= found.error_bound + 1e-12).all(), (error, found.error_bound)


def test_device_and_host_rank_alike_wherever_the_gap_exceeds_their_accuracy():
    B, A = gaussian(400, 300, 16, k=24)
    B[:, :, 0] *= torch.linspace(1.0, 3.0, 24, dtype=torch.float64)[:, None]
    modules = list(zip(B.bfloat16(), A.bfloat16(), strict=True))
    host, device = (index(precision.solve(modules, "two_sided", device=d)) for d in ("cpu", DEVICE))
    order = host.argsort()
    assert (device[order].diff()[host[order].diff() > 2 * ACCURACY] > 0).all()


def mixed_modules():
    """Modules of one rank with several shapes, dtypes and layouts, in no particular order."""
    made = []
    for i, (m, n) in enumerate([(40, 30), (30, 40), (40, 30), (64, 20), (40, 30), (1, 90)]):
        B, A = gaussian(m, n, 16, k=1, seed=i)
        dtype = (torch.bfloat16, torch.float32, torch.float16)[i % 3]
        made.append((B[0].to(dtype), A[0].to(dtype)))
    made.append((made[0][0].mT.contiguous().mT, made[0][1].mT.contiguous().mT))
    made.append((made[1][0][::2], made[1][1][:, 3:17]))
    return made


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**25])
def test_chunks_change_neither_scores_nor_their_order(monkeypatch, chunk_bytes):
    expected = precision.solve(mixed_modules(), "two_sided")
    monkeypatch.setattr(devices, "CHUNK_BYTES", chunk_bytes)
    found = precision.solve(mixed_modules(), "two_sided", device=DEVICE)
    assert_same_index(index(found), index(expected))
    for name in ("row_mean", "column_mean", "frobenius", "factors"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0.0
        )


def test_a_module_larger_than_a_chunk_stays_on_the_host(monkeypatch):
    monkeypatch.setattr(devices, "CHUNK_BYTES", 5000)
    modules = [(B.float(), A.float()) for B, A in zip(*gaussian(20, 20, 16, k=1), strict=True)]
    large = gaussian(200, 200, 16, k=1)
    chunks = list(devices.upload([[*modules, (large[0][0], large[1][0])]], DEVICE, lambda: None))
    places = [type(chunk.place) for chunk in chunks]
    assert places == [devices.DeviceModules, HostModules]


def test_ranks_beyond_the_kernels_are_scored_on_the_device_in_float64():
    place = on_device([gaussian(90, 80, 96, k=1)])
    assert place.arithmetics == (torch.float64,)


def test_on_a_full_device_modules_are_scored_on_the_host(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = precision.solve(mixed_modules(), "two_sided")
    monkeypatch.setattr(devices.Uploader, "start", full)
    found = precision.solve(mixed_modules(), "two_sided", device=DEVICE)
    assert torch.equal(found.normalised, expected.normalised)


def test_factors_cut_from_one_buffer_are_copied_as_one_span():
    buffer = torch.arange(4000, dtype=torch.float32)
    factors = [
        buffer[100:180].view(10, 8),
        buffer[180:260].view(8, 10),
        buffer[400:480].view(10, 8),
    ]
    span = devices._shared_span(factors)
    assert span.data_ptr() <= factors[0].data_ptr()
    assert span.data_ptr() + span.numel() == factors[2].data_ptr() + 320
    assert devices._shared_span([*factors, torch.ones(3, 3)]) is None
    assert devices._shared_span([buffer[:8].view(4, 2), buffer[-8:].view(2, 4)]) is None


@pytest.mark.skipif(not GPU, reason="needs a CUDA device: the bound is on its memory")
def test_device_memory_stays_bounded():
    torch.cuda.reset_peak_memory_stats()
    B, A = gaussian(4096, 4096, 64, k=1)
    modules = [(B[0].bfloat16().clone(), A[0].bfloat16().clone()) for _ in range(200)]
    precision.solve(modules, "two_sided", device=DEVICE)
    assert torch.cuda.max_memory_allocated() <= 256 * 2**20
