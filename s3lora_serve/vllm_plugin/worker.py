"""The gate as vLLM's worker extension (`--worker-extension-cls`), which fails closed.

vLLM skips a plugin that VLLM_PLUGINS leaves out or that fails to import, and serves unguarded. It
imports a worker extension in every worker, and does not start if that import fails.
"""

from s3lora_serve.vllm_plugin.plugin import register

register()


class GuardedWorker:
    """Adds nothing to a worker: the import of this module guards it."""
