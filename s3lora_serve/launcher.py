"""`s3lora serve`: vLLM's own API server, started with what the gate needs; no more is changed."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from s3lora_serve import supervisor
from s3lora_serve.guarding import ENDPOINT_GROUP, PLUGIN, installed_vllm
from s3lora_serve.server_files import ServerFiles
from s3lora_serve.settings import Settings

EXTENSION = "--worker-extension-cls"
GUARDED_WORKER = "s3lora_serve.vllm_plugin.worker.GuardedWorker"
"""A worker that cannot import it does not start: a plugin that cannot be imported is skipped."""


RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
"""Of the environment, Ray's workers get what begins with one of these, and vLLM's own."""


def serve(model: str, arguments: Sequence[str], settings: Settings) -> int:
    """Run the server until it ends, and remove what it leaves; how it ended, as of `run`.

    Raises:
        GateFailed: there is no room or right for its files.
    """
    with ServerFiles(settings) as files:
        return supervisor.run(command(model, arguments), environment(os.environ, files.metrics))


def command(model: str, arguments: Sequence[str]) -> list[str]:
    """The command line that starts vLLM's server, each worker of which imports the gate.

    A worker extension of the user's own is kept: vLLM takes only one.

    The CPU distribution's `vllm` command looks for a distribution named vllm and fails, so there
    the server's module is run directly.
    """
    found = installed_vllm()
    own = () if extension_of(arguments) else (EXTENSION, GUARDED_WORKER)
    if found and found[0] == "vllm":
        start = ["vllm.entrypoints.cli.main", "serve", model]
    else:
        start = ["vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", *start, *arguments, *own]


def extension_of(arguments: Sequence[str]) -> str | None:
    """The worker extension among vLLM's arguments, in any spelling that vLLM takes."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == EXTENSION:
            found = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
    return found


def environment(current: Mapping[str, str], metrics: Callable[[], Path]) -> dict[str, str]:
    """The environment of the server: what the user set is kept, what is missing is added.

    `metrics` makes the folder for its metrics, where the user names none.
    """
    added = dict(current)
    added["VLLM_PLUGINS"] = _plugins(current.get("VLLM_PLUGINS"))
    added[RAY_PREFIXES] = _with_ours(current.get(RAY_PREFIXES, ""))
    if "PROMETHEUS_MULTIPROC_DIR" not in current:
        added["PROMETHEUS_MULTIPROC_DIR"] = str(metrics())
    return added


def _plugins(allowed: str | None) -> str:
    """VLLM_PLUGINS naming ours beside everything that would have loaded without it.

    Unset means all plugins but endpoint plugins; set, it is one list for all groups.
    """
    if allowed is not None:
        names = [name for name in allowed.split(",") if name]
    else:
        names = sorted(
            {
                entry.name
                for group in entry_points().groups
                if group.startswith("vllm.") and group != ENDPOINT_GROUP
                for entry in entry_points(group=group)
            }
        )
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def _with_ours(prefixes: str) -> str:
    named = [prefix for prefix in prefixes.split(",") if prefix]
    return ",".join(dict.fromkeys([*named, "S3LORA_"]))
