"""Whether vLLM's front end would be one that the gate guards."""

import os
from collections.abc import Sequence

from s3lora_serve.errors import FrontEndUnguarded, S3LoRAError
from s3lora_serve.launcher.check import Check
from s3lora_serve.policy.file import serving_policy
from s3lora_serve.vllm_plugin.front_end import asked_for


def front_end(arguments: Sequence[str]) -> Check:
    """The front end that the environment and vLLM's arguments ask for."""
    reason = asked_for(os.environ, arguments)
    if reason is None:
        return Check("front end", True, "vLLM's Python API server")
    return Check("front end", False, str(FrontEndUnguarded(reason)), essential=not _is_allowed())


def _is_allowed() -> bool:
    try:
        policy = serving_policy()
    except S3LoRAError:  # the check of the policy reports it
        return False
    return policy.mode == "off" or policy.unguarded_frontends == "allow"
