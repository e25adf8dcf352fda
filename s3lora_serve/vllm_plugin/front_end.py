"""Front ends of vLLM other than its Python API server, and whether one was asked for.

The gate decides on registrations in the Python API server. Behind another front end only the
workers decide: what they refuse is quarantined, where the client should have got an error.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RUST_SWITCH = "VLLM_USE_RUST_FRONTEND"
GRPC_SWITCH = "--grpc"

_RUST = "vLLM's Rust front end registers adapters without the gate: only the workers decide"
_GRPC = "vLLM's gRPC server has none of the gate's routes, and no test of the gate ran on it"
_GRPC_MODULES = {"vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server"}
_RUST_PROGRAM = "vllm-rs"


def asked_for(environment: Mapping[str, str], arguments: Sequence[str]) -> str | None:
    """Why the front end that vLLM would start is not guarded; None if it is."""
    if environment.get(RUST_SWITCH, "0").strip().lstrip("0"):
        return f"{RUST_SWITCH}={environment[RUST_SWITCH]}: {_RUST}"
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if GRPC_SWITCH in names:
        return f"{GRPC_SWITCH}: {_GRPC}"
    return None


def running() -> str | None:
    """Why the front end of this vLLM process is not guarded; None if it is, as far as it shows.

    A configuration file can ask for the gRPC server, and `vllm-rs serve` starts engines itself.
    """
    if reason := asked_for(os.environ, ()):
        return reason
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if _GRPC_MODULES & {*sys.modules, getattr(main, "name", "")}:
        return _GRPC
    return f"{_RUST_PROGRAM} serve: {_RUST}" if _parent() == _RUST_PROGRAM else None


def _parent() -> str | None:
    """The name of the program that started this process."""
    try:
        return Path(f"/proc/{os.getppid()}/exe").readlink().name
    except OSError:  # another user's process, or not Linux
        return None
