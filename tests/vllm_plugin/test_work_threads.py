"""Work in the background does not keep a server from ending."""

import subprocess
import sys

PROGRAM = """
import time
from s3lora_serve.vllm_plugin.api.work_threads import start_in_background, stop_at_exit

def compile_kernels():
    for _ in range(1200):
        stop_at_exit()
        time.sleep(0.05)
    print("compiled all", flush=True)

start_in_background(compile_kernels)
time.sleep(0.3)
print("the server has ended", flush=True)
"""


def test_a_process_ends_while_kernels_are_being_compiled():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout == "the server has ended\n"
    assert done.stderr == ""
