"""`s3lora serve`: vLLM's own API server, started with what the gate needs; no more is changed."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from s3lora_serve.guarding import ENDPOINT_GROUP, PLUGIN, installed_vllm

_METRICS_PREFIX = "s3lora-metrics-"


def command(model: str, arguments: Sequence[str]) -> list[str]:
    """The command line that starts vLLM's server.

    The CPU distribution's `vllm` command looks for a distribution named vllm and fails, so there
    the server's module is run directly.
    """
    found = installed_vllm()
    if found and found[0] == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *arguments]
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, "--model", model, *arguments]


def environment(current: Mapping[str, str]) -> dict[str, str]:
    """The environment of the server: what the user set is kept, what is missing is added."""
    added = dict(current)
    added["VLLM_PLUGINS"] = _plugins(current.get("VLLM_PLUGINS"))
    if "PROMETHEUS_MULTIPROC_DIR" not in current:
        added["PROMETHEUS_MULTIPROC_DIR"] = str(_fresh_metrics_dir())
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


def _fresh_metrics_dir() -> Path:
    """A new folder for the metrics of this server's processes; those of dead servers are removed.

    The folder carries our process id, which the server keeps since it replaces this process.
    """
    parent = Path(tempfile.gettempdir())
    for old in parent.glob(f"{_METRICS_PREFIX}*"):
        owner = old.name.removeprefix(_METRICS_PREFIX).partition("-")[0]
        if owner.isdecimal() and (int(owner) == os.getpid() or not _alive(int(owner))):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_METRICS_PREFIX}{os.getpid()}-"))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
