"""Entry points. Everything is imported inside the functions: vLLM logs and skips a plugin whose
import fails, which would serve unguarded, while an exception raised here stops the process."""

from typing import Any


def register() -> None:
    """Guard this process (`vllm.general_plugins`); may run several times.

    Raises:
        S3LoRAError: the policy, the environment or vLLM's contract is not as it must be.
    """
    from s3lora_serve.vllm_plugin.hook import install

    install()


def endpoint() -> Any:
    """The HTTP routes (`vllm.endpoint_plugins`), made in the API server only."""
    from s3lora_serve.vllm_plugin.endpoint import GateEndpoint

    return GateEndpoint()
