"""The hook installs itself only in a vLLM whose code keeps the contract."""

import json
import subprocess
import sys

import pytest

from tests.support.server import base_environment

pytestmark = pytest.mark.serving

BREAKERS = {
    "another signature": "W._load_adapter = lambda self, lora_request, more: None",
    "method gone": "del W._load_adapter",
    "another owner": "L._load_adapter = lambda self, lora_request: None",
    "attribute gone": "C.AsyncMPClient.__mro__[1].__init__ = lambda self: None",
    "no loras": "M.LoRAModel.__init__ = lambda self, lora_model_id: None",
}
RUNNER = (
    "from s3lora_serve.vllm_plugin import contract, plugin; plugin.register();"
    "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as R;{}"
    "contract.check_model_runners()"
)
"""What a worker checks once its model has LoRA modules."""

BREAKERS["a model runner of its own"] = RUNNER.format("R.remove_lora = lambda self, lora_id: True;")
STARTERS = {
    "model runner": RUNNER.format(""),
    "loading twice": (
        "from s3lora_serve.vllm_plugin.plugin import register; register();"
        "once = W._load_adapter; register(); assert W._load_adapter is once"
    ),
    "unknown version": (
        "import importlib.metadata as packages; found = packages.version;"
        "packages.version = lambda name: '0.99.0' if 'vllm' in name else found(name)"
    ),
}
UNGUARDED = {
    "the Rust front end": "os.environ['VLLM_USE_RUST_FRONTEND'] = '1'",
    "the gRPC server, as in a configuration file": (
        "import types; name = 'vllm.entrypoints.launchers.grpc_server';"
        "sys.modules[name] = types.ModuleType(name)"
    ),
}
ALLOWED = (
    "open(f'{folder}/allow.yaml', 'w').write('unguarded_frontends: allow');"
    "os.environ['S3LORA_POLICY'] = f'{folder}/allow.yaml';"
)
PROGRAM = """
import json, os, sys, traceback
import vllm.lora.worker_manager as w, vllm.lora.lora_model as M, vllm.v1.engine.core_client as C
from vllm.plugins import load_general_plugins
W, L = w.WorkerLoRAManager, w.LRUCacheWorkerLoRAManager
cases, folder = json.loads(sys.argv[1]), sys.argv[2]
for place, change in enumerate(cases):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    log = os.open(f"{folder}/{place}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        exec(change)
        load_general_plugins()
        print("STARTED", flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs of processes that loaded vLLM's plugins, by case; vLLM is imported once."""
    folder = tmp_path_factory.mktemp("contract")
    allowed = {f"{case}, allowed": ALLOWED + change for case, change in UNGUARDED.items()}
    cases = BREAKERS | STARTERS | UNGUARDED | allowed
    subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(cases.values())), folder],
        env=base_environment() | {"VLLM_PLUGINS": "s3lora"}, check=True,
    )  # fmt: skip
    return {case: (folder / str(place)).read_text() for place, case in enumerate(cases)}


@pytest.mark.parametrize("case", BREAKERS)
def test_a_vllm_that_breaks_the_contract_stops_the_process(logs, case):
    assert "STARTED" not in logs[case]
    assert "S3LORA-903" in logs[case]


def test_the_installed_vllm_keeps_the_contract_and_loading_twice_is_harmless(logs):
    assert "STARTED" in logs["loading twice"], logs["loading twice"]


def test_the_installed_model_runner_keeps_the_contract(logs):
    assert "STARTED" in logs["model runner"], logs["model runner"]


def test_an_unknown_version_that_keeps_the_contract_starts_with_a_warning(logs):
    assert "STARTED" in logs["unknown version"], logs["unknown version"]
    assert "0.99.0 was never checked" in logs["unknown version"]


@pytest.mark.parametrize("case", UNGUARDED)
def test_a_front_end_that_is_not_guarded_stops_the_process(logs, case):
    assert "STARTED" not in logs[case]
    assert "S3LORA-912" in logs[case]


@pytest.mark.parametrize("case", UNGUARDED)
def test_a_front_end_that_the_policy_allows_starts_with_a_warning(logs, case):
    log = logs[f"{case}, allowed"]
    assert "STARTED" in log, log
    assert "s3lora: " in log
