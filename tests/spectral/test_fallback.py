"""A device that cannot score is never a reason to refuse an adapter, or to stop."""

import logging

import pytest
import torch

from s3lora_serve.spectral import Factors, device, fallback, precision, score_modules
from tests.support.factors import gaussian


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    fallback.reset()
    monkeypatch.setattr(fallback, "_say", logging.getLogger(fallback.__name__).warning)
    yield
    fallback.reset()


@pytest.fixture
def modules():
    return [(B.float(), A.float()) for B, A in zip(*gaussian(20, 30, 4, k=2), strict=True)]


def failing(monkeypatch, error):
    """Have the device path fail; the list grows by each try."""
    tries = []

    def solve(*_):
        tries.append(error)
        raise error

    monkeypatch.setattr(device, "fits", lambda *_: True)
    monkeypatch.setattr(device, "solve", solve)
    return tries


ERRORS = [
    RuntimeError("PassManager::run failed\nand much more"),
    OSError("libcuda.so.1: cannot open shared object file"),
    ImportError("cannot import name 'triton_key'"),
    KeyError("sm_123"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_device_that_fails_is_not_tried_again_and_said_once(monkeypatch, caplog, modules, error):
    tries = failing(monkeypatch, error)
    expected = precision.solve(modules, "two_sided")
    for _ in range(3):
        found = precision.solve(modules, "two_sided", device="cuda")
        assert torch.equal(found.normalised, expected.normalised)
    assert len(tries) == 1
    [line] = caplog.messages
    assert "from now on the CPU scores" in line
    assert "much more" not in line
    assert fallback.take_counts() == {"failure": 3}
    assert fallback.take_counts() == {}


def test_a_full_device_is_tried_again_with_the_next_adapter(monkeypatch, caplog, modules):
    tries = failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    for _ in range(3):
        precision.solve(modules, "two_sided", device="cuda")
    assert len(tries) == 3
    assert len(caplog.messages) == 1
    assert fallback.take_counts() == {"memory": 3}


@pytest.mark.parametrize(
    ("error", "cause"),
    [(RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
     (fallback.DeviceBusy("no turn within 1 s"), "busy")],
    ids=["of the driver", "busy"],
)  # fmt: skip
def test_what_may_pass_is_tried_again(monkeypatch, modules, error, cause):
    tries = failing(monkeypatch, error)
    for _ in range(2):
        precision.solve(modules, "two_sided", device="cuda")
    assert len(tries) == 2
    assert fallback.take_counts() == {cause: 2}


def test_a_device_that_another_thread_holds_is_left_to_it(monkeypatch, modules):
    monkeypatch.setattr(device, "WAITING_SECONDS", 0.01)
    monkeypatch.setattr(device, "fits", lambda *_: True)
    expected = precision.solve(modules, "two_sided")
    with device._one_at_a_time:
        found = precision.solve(modules, "two_sided", device="cpu:0")
    assert torch.equal(found.normalised, expected.normalised)
    assert fallback.take_counts() == {"busy": 1}


def test_nobody_waits_for_a_device_whose_kernels_are_being_compiled(monkeypatch, modules):
    monkeypatch.setattr(device, "WAITING_SECONDS", 600)
    monkeypatch.setattr(device, "fits", lambda *_: True)
    expected, found = precision.solve(modules, "two_sided"), []

    def compiling(*_):
        found.append(precision.solve(modules, "two_sided", device="cpu:0"))

    monkeypatch.setattr(device, "_solve", compiling)
    device.warm_up("cpu:0")
    assert len(found) == len(device.COMMON)
    assert all(torch.equal(each.normalised, expected.normalised) for each in found)
    assert fallback.take_counts() == {"busy": len(found)}
    monkeypatch.undo()
    with device.turn("cpu:0"):
        pass


def test_compiling_stops_between_kernels_when_the_process_ends(monkeypatch):
    tries = []

    def compiling(_modules, _device, between):
        tries.append(1)
        between()

    def exiting():
        raise PastDeadline

    monkeypatch.setattr(device, "fits", lambda *_: True)
    monkeypatch.setattr(device, "_solve", compiling)
    with pytest.raises(PastDeadline):
        device.warm_up("cpu:0", exiting)
    assert len(tries) == 1
    with device.turn("cpu:0"):
        assert not device._warming_up.is_set()


class PastDeadline(Exception):
    pass


def test_a_deadline_ends_scoring_and_is_no_failure_of_the_device(monkeypatch, modules):
    def solve(_modules, _device, between_batches):
        between_batches()
        pytest.fail("the deadline has passed")

    def late():
        raise PastDeadline

    monkeypatch.setattr(device, "fits", lambda *_: True)
    monkeypatch.setattr(device, "solve", solve)
    with pytest.raises(PastDeadline):
        precision.solve(modules, "two_sided", late, device="cuda")
    assert fallback.take_counts() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_scores_on_a_machine_without_the_device_are_those_of_the_host(caplog, modules):
    named = [Factors(f"m{i}", B, A, 1.0) for i, (B, A) in enumerate(modules)]
    assert score_modules(named, device="cuda") == score_modules(named, device="cpu")
    assert fallback.take_counts() in ({"failure": 1}, {})  # {}: no Triton here
    assert all(record.levelno == logging.WARNING for record in caplog.records)
