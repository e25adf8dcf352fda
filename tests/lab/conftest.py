"""Calibration computes on matrices so small that threads cost more than they save."""

import pytest

from tests.support.tiny_chat import one_thread


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    with one_thread():
        yield
