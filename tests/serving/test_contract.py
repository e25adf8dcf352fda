"""The hook installs itself only where vLLM is what it was written for."""

import subprocess
import sys

import pytest

from tests.support.server import base_environment

pytestmark = pytest.mark.serving

BREAKERS = {
    "another signature": "W._load_adapter = lambda self, lora_request, more: None",
    "method gone": "del W._load_adapter",
    "another owner": "L._load_adapter = lambda self, lora_request: None",
    "no loras": "M.LoRAModel.__init__ = lambda self, lora_model_id: None",
}
PROGRAM = """
import vllm.lora.worker_manager as w, vllm.lora.lora_model as M
W, L = w.WorkerLoRAManager, w.LRUCacheWorkerLoRAManager
{breaker}
from vllm.plugins import load_general_plugins
load_general_plugins()
print("STARTED")
"""


def start(breaker, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(breaker=breaker)],
        env=base_environment() | {"VLLM_PLUGINS": "s3lora"} | environment,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("case", BREAKERS)
def test_a_vllm_that_breaks_the_contract_stops_the_process(case):
    done = start(BREAKERS[case])
    assert done.returncode != 0
    assert "STARTED" not in done.stdout
    assert "S3LORA-903" in done.stderr


def assert_starts(done):
    assert done.returncode == 0, done.stderr[-2000:]
    assert "STARTED" in done.stdout


def test_the_installed_vllm_keeps_the_contract_and_loading_twice_is_harmless():
    done = start(
        "from s3lora_serve.vllm_plugin.plugin import register; register();"
        "once = W._load_adapter; register(); assert W._load_adapter is once"
    )
    assert_starts(done)


def test_an_unknown_version_that_keeps_the_contract_starts_with_a_warning():
    done = start(
        "import importlib.metadata as packages; found = packages.version;"
        "packages.version = lambda name: '0.99.0' if 'vllm' in name else found(name)"
    )
    assert_starts(done)
    assert "0.99.0 was never checked" in done.stdout + done.stderr
