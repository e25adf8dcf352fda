"""vLLM's own resolvers, which look adapters up by the model name of a request: who asked for them.

They are opt-in. The filesystem resolver is asked for by its variable or by name, the hub resolver
by name alone, as vLLM itself demands.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from s3lora_serve.errors import S3LoRAError
from s3lora_serve.launcher.check import Check
from s3lora_serve.policy.file import serving_policy

FILESYSTEM, HUB = "lora_filesystem_resolver", "lora_hf_hub_resolver"
"""Names of their entry points."""

FOLDER, REPOSITORIES = "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST"
"""Where they look."""


def not_asked_for(environment: Mapping[str, str]) -> set[str]:
    """Resolver plugins that an unset VLLM_PLUGINS does not ask for."""
    return {HUB} if environment.get(FOLDER) else {HUB, FILESYSTEM}


def resolvers() -> Check:
    """Which resolvers a server would have, and whether the policy allows them."""
    named = os.environ.get("VLLM_PLUGINS")
    listed = (named or "").split(",")
    folder = os.environ.get(FOLDER)
    repositories = os.environ.get(REPOSITORIES)
    found = []
    if folder and (named is None or FILESYSTEM in listed):
        if not Path(folder).is_dir():
            return Check("resolvers", False, f"{FOLDER}={folder} is not a folder")
        found.append(f"filesystem, below {folder}")
    if repositories and HUB in listed:
        if _has_roots():
            detail = f"{HUB} downloads, which limits.roots excludes: take it out of VLLM_PLUGINS"
            return Check("resolvers", False, f"{detail}, or unset limits.roots")
        found.append(f"hub, of {repositories}")
    elif repositories:
        found.append(f"not the hub's: VLLM_PLUGINS does not name {HUB}")
    return Check("resolvers", True, "; ".join(found) or "none")


def _has_roots() -> bool:
    try:
        policy = serving_policy()
    except S3LoRAError:  # the check of the policy reports it
        return False
    return policy.mode != "off" and bool(policy.limits.roots)
