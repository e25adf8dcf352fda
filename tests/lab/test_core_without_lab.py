"""The core runs without the lab."""

import json
import subprocess
import sys

SERVER = (
    "s3lora_serve", "s3lora_serve.cli", "s3lora_serve.launcher.supervisor",
    "s3lora_serve.vllm_plugin.plugin", "s3lora_serve.vllm_plugin.hook",
    "s3lora_serve.vllm_plugin.api.routes", "s3lora_serve.vllm_plugin.engine.loader",
)  # fmt: skip
"""What `s3lora serve`, the API server and the workers import."""

PROGRAM = f"""
import json, sys
from importlib import import_module
for name in {SERVER}:
    import_module(name)
from s3lora_serve import Policy, scan_adapter, strip_adapter
print("FOUND", json.dumps([name for name in sys.modules if name.startswith("s3lora_serve.")]))
"""


def test_a_guarded_server_and_the_public_names_load_nothing_of_the_lab():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    loaded = json.loads(line.removeprefix("FOUND "))
    assert "s3lora_serve.vllm_plugin.hook" in loaded
    assert not [name for name in loaded if name.startswith("s3lora_serve.lab")]
