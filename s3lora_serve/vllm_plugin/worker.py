"""The gate as vLLM's worker extension (`--worker-extension-cls`), for servers that require it.

vLLM skips a plugin that VLLM_PLUGINS leaves out or that fails to import, and serves unguarded. A
worker extension it imports in every worker, and a failure there ends the start.
"""

from s3lora_serve.vllm_plugin.plugin import register

register()


class GuardedWorker:
    """Adds nothing to a worker: importing this module has guarded it."""
