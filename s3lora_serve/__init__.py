"""s3lora-serve: the gate that looks at every LoRA adapter before vLLM serves it.

Names are imported when first used: vLLM imports this package in every process to find the plugin,
and an import that failed there would leave the server unguarded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3lora_serve.policy import Policy
    from s3lora_serve.scan import scan_adapter
    from s3lora_serve.strip import strip_adapter
    from s3lora_serve.verdict import Verdict

__all__ = ["Policy", "Verdict", "scan_adapter", "strip_adapter"]

_HOMES = {
    "Policy": "policy",
    "Verdict": "verdict",
    "scan_adapter": "scan",
    "strip_adapter": "strip",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("s3lora-serve")
    if name in _HOMES:
        return getattr(import_module(f"s3lora_serve.{_HOMES[name]}"), name)
    raise AttributeError(f"module 's3lora_serve' has no attribute {name!r}")
