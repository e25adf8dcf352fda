"""Command line and environment of vLLM's API server under the gate."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from s3lora_serve.launcher.checks import ENDPOINT_GROUP, PLUGIN
from s3lora_serve.launcher.resolvers import not_asked_for
from s3lora_serve.vllm_plugin.vllm_version import installed_vllm

EXTENSION = "--worker-extension-cls"
GUARDED_WORKER = "s3lora_serve.vllm_plugin.worker.GuardedWorker"
"""vLLM does not start a worker that cannot import its extension; a plugin it would skip."""

RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
"""Ray's workers get the environment variables with one of these prefixes, beside vLLM's own."""


def command(model: str, arguments: Sequence[str]) -> list[str]:
    """The command line of vLLM's server, with the gate as worker extension.

    The user's own worker extension is kept: vLLM takes only one. The `vllm` command of the CPU
    distribution looks for a distribution named vllm and fails, so its module is run directly.
    """
    found = installed_vllm()
    own = () if extension_of(arguments) else (EXTENSION, GUARDED_WORKER)
    if found and found[0] == "vllm":
        start = ["vllm.entrypoints.cli.main", "serve", model]
    else:
        start = ["vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", *start, *arguments, *own]


def extension_of(arguments: Sequence[str]) -> str | None:
    """The worker extension among vLLM's arguments, in any spelling that vLLM accepts."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == EXTENSION:
            found = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
    return found


def environment(current: Mapping[str, str], metrics: Callable[[], Path]) -> dict[str, str]:
    """The environment of the server: the user's variables, and those that are missing.

    `metrics` creates the folder for its metrics if the user names none.
    """
    added = dict(current)
    added["VLLM_PLUGINS"] = _plugins(current)
    added[RAY_PREFIXES] = _ray_prefixes(current.get(RAY_PREFIXES, ""))
    if "PROMETHEUS_MULTIPROC_DIR" not in current:
        added["PROMETHEUS_MULTIPROC_DIR"] = str(metrics())
    return added


def _plugins(current: Mapping[str, str]) -> str:
    """VLLM_PLUGINS with the gate beside all plugins that would load without it.

    Unset, it means all plugins except endpoint plugins, and resolvers that nobody asked for: naming
    the hub's is what enables it. Set, it is one list for all groups.
    """
    allowed = current.get("VLLM_PLUGINS")
    if allowed is not None:
        names = [name for name in allowed.split(",") if name]
    else:
        found = {
            entry.name
            for group in entry_points().groups
            if group.startswith("vllm.") and group != ENDPOINT_GROUP
            for entry in entry_points(group=group)
        }
        names = sorted(found - not_asked_for(current))
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def _ray_prefixes(prefixes: str) -> str:
    named = [prefix for prefix in prefixes.split(",") if prefix]
    return ",".join(dict.fromkeys([*named, "S3LORA_"]))
