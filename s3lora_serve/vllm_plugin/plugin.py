"""Entry points of the plugin.

Imports are inside the functions. vLLM logs and skips a plugin whose import fails, and would serve
unguarded; an exception raised in the function stops the process.
"""

from typing import Any


def register() -> None:
    """Guard this process (`vllm.general_plugins`); vLLM may call it several times.

    Raises:
        S3LoRAError: invalid policy or environment, or an unknown vLLM.
    """
    from s3lora_serve.vllm_plugin.hook import install

    install()


def endpoint() -> Any:
    """The HTTP routes (`vllm.endpoint_plugins`); created in the API server only."""
    from s3lora_serve.vllm_plugin.api.routes import GateRoutes
    from s3lora_serve.vllm_plugin.hook import registrations

    return GateRoutes(registrations)
