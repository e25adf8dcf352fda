"""Session-wide fixtures: the tiny model and adapters that real PEFT trained for it."""

import os
from pathlib import Path

import pytest

from tests.support.adapters import copy_with, spike, train_adapter
from tests.support.tiny_model import make_model

SPIKED_MODULE = "model.layers.2.self_attn.v_proj"


ENGINES = ("tests/serving/", "tests/deploy/test_dashboards.py")
"""Tests that run real vLLM engines."""


def pytest_xdist_make_scheduler(config, log):
    """Engines want the machine for themselves: with `pytest -n 2` one process has all of them."""
    from xdist.scheduler import LoadScopeScheduling

    class OneAtATime(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "engines" if nodeid.startswith(ENGINES) else nodeid.partition("::")[0]

    return OneAtATime(config, log)


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside():
    for name in [name for name in os.environ if name.startswith(("S3LORA_", "VLLM_"))]:
        del os.environ[name]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def model(workplace) -> Path:
    return make_model(workplace / "model")


@pytest.fixture(scope="session")
def trained(model, workplace) -> Path:
    """A LoRA on all seven projections, r = 8."""
    return train_adapter(model, workplace / "trained", seed=1)


@pytest.fixture(scope="session")
def spiked(trained, workplace) -> Path:
    """The trained adapter with one dominant direction planted in SPIKED_MODULE."""
    return copy_with(trained, workplace / "spiked", spike(SPIKED_MODULE))
