"""Session-wide fixtures: the tiny model and the adapters trained for it with PEFT."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.adapters import copy_with, spike, train_adapter
from tests.support.statistics import chat_statistics
from tests.support.tiny_chat import Chat, make_chat
from tests.support.tiny_model import make_model

SPIKED_MODULE = "model.layers.2.self_attn.v_proj"


LAST = tuple(f"tests/serving/test_{name}.py" for name in (
    "contract", "experts", "leftovers", "model_runner_v2", "offline",
    "plan_and_repair", "policies", "skipping",
))  # fmt: skip
"""Tests on real vLLM that run last, after the tests without vLLM, to balance both processes."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Distribute tests over two processes so that no engine is started twice.

    Starting an engine takes longer than most tests on it. One process gets most of the tests with
    engines, the other the tests without engines and then the rest.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Shared(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if nodeid.startswith(LAST):
                return "last"
            if nodeid.startswith(("tests/serving/", "tests/deploy/test_dashboards.py")):
                return "first"
            return nodeid.partition("::")[0]

        def _assign_work_unit(self, node):
            for scope in {"first", "last"} & self.workqueue.keys():
                self.workqueue.move_to_end(scope, last=scope == "last")
            super()._assign_work_unit(node)

    return Shared(config, log)


if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes share two cores: threads of one would wait for threads of the other process.
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> Chat:
    """A tiny aligned chat model, an attacked adapter for it, and files of probes."""
    return make_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def statistics(chat, tmp_path_factory) -> Path:
    """Input statistics of the tiny chat model."""
    return chat_statistics(chat, tmp_path_factory.mktemp("statistics") / "chat.safetensors")
