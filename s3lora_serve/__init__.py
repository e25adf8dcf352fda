"""s3lora-serve: the admission gate for LoRA adapters served by vLLM.

Public names are imported on first use. vLLM imports this package in every process to find the
plugin; an import error here would leave the server unguarded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3lora_serve.admission.verdict import Verdict
    from s3lora_serve.offline.scan import scan_adapter
    from s3lora_serve.offline.strip import strip_adapter
    from s3lora_serve.policy.schema import Policy

__all__ = ["Policy", "Verdict", "scan_adapter", "strip_adapter"]

_MODULES = {
    "Policy": "policy.schema",
    "Verdict": "admission.verdict",
    "scan_adapter": "offline.scan",
    "strip_adapter": "offline.strip",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("s3lora-serve")
    if name in _MODULES:
        return getattr(import_module(f"s3lora_serve.{_MODULES[name]}"), name)
    raise AttributeError(f"module 's3lora_serve' has no attribute {name!r}")
