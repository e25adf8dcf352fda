"""Session-wide fixtures: the tiny model and adapters that real PEFT trained for it."""

import os
from pathlib import Path

import pytest

from tests.support.adapters import copy_with, spike, train_adapter
from tests.support.tiny_model import make_model

SPIKED_MODULE = "model.layers.2.self_attn.v_proj"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Engines want the machine for themselves: with `pytest -n 2` one process has all of them."""
    for item in items:
        if item.get_closest_marker("serving"):
            item.add_marker(pytest.mark.xdist_group("engines"))


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
