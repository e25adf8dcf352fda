"""Checks whether a server started in this environment would be guarded; vLLM is not imported.

`doctor` prints them. `serve` does not start a server if an essential check fails.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from s3lora_serve.admission.policy_files import POLICY_FILES
from s3lora_serve.errors import S3LoRAError, SettingInvalid
from s3lora_serve.launcher.check import Check
from s3lora_serve.launcher.front_end import front_end
from s3lora_serve.launcher.resolvers import resolvers
from s3lora_serve.policy.file import serving_policy
from s3lora_serve.settings import load_settings
from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.vllm_plugin.vllm_version import installed_vllm, is_supported

PLUGIN = "s3lora"
"""Name of both entry points of the plugin: VLLM_PLUGINS is one list for all groups."""

GENERAL_GROUP = "vllm.general_plugins"
ENDPOINT_GROUP = "vllm.endpoint_plugins"


def checks(arguments: Sequence[str] = ()) -> Iterator[Check]:
    """The checks, in the order in which failures should be fixed; `arguments` are vLLM's."""
    yield _vllm_release()
    yield from _plugin()
    yield _policy()
    yield from _policy_files()
    yield front_end(arguments)
    yield resolvers()
    yield _state_dir()
    yield _metrics_dir()


def _vllm_release() -> Check:
    """Whether the gate was checked against the installed vLLM."""
    found = installed_vllm()
    if found is None:
        return Check("vLLM", False, "not installed: install s3lora-serve beside vLLM")
    name, release = found
    if is_supported(release):
        return Check("vLLM", True, f"{name} {release}")
    return Check("vLLM", False, f"{name} {release} was never checked", essential=False)


def _plugin() -> Iterator[Check]:
    for group in (GENERAL_GROUP, ENDPOINT_GROUP):
        found = entry_points(group=group, name=PLUGIN)
        try:
            for entry in found:
                entry.load()
            passed, detail = bool(found), "installed" if found else "no entry point: reinstall"
        except Exception as error:  # noqa: BLE001 - vLLM would log this and serve unguarded
            passed, detail = False, f"does not import: {type(error).__name__}: {error}"
        yield Check(f"entry point {group}", passed, detail)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        detail = (
            "unset: the gate loads; its HTTP routes do not, and /adapters asks for no key"
            f" (s3lora serve adds {PLUGIN})"
        )
        yield Check("VLLM_PLUGINS", True, detail)
    else:
        yield Check("VLLM_PLUGINS", PLUGIN in allowed.split(","), f"{allowed!r} must list {PLUGIN}")


def _policy() -> Check:
    try:
        policy = serving_policy()
    except S3LoRAError as error:
        return Check("policy", False, str(error))
    if policy.mode == "off":
        return Check("policy", False, "mode is off: nothing is looked at", essential=False)
    name, value = policy.strip.rule
    return Check("policy", True, f"{policy.mode}, strip {name} {value:g}, {policy.digest[:19]}…")


def _policy_files() -> Iterator[Check]:
    """The files that a valid policy names, and whether they can be used."""
    try:
        policy = serving_policy()
    except S3LoRAError:
        return
    for file in POLICY_FILES if policy.mode != "off" else ():
        if not file.is_named(policy):
            continue
        try:
            file.check(policy)
        except S3LoRAError as error:
            yield Check(file.name, False, str(error))
        else:
            detail, passed = file.told(policy)
            yield Check(file.name, passed, detail, essential=passed)


def _state_dir() -> Check:
    try:
        store = AdapterStore(load_settings().state_dir)
        store.prepare()
    except S3LoRAError as error:
        return Check("state folder", False, str(error))
    return Check("state folder", os.access(store.root, os.W_OK | os.X_OK), str(store.root))


def _metrics_dir() -> Check:
    name = "PROMETHEUS_MULTIPROC_DIR"
    folder = os.environ.get(name)
    if folder is None:
        return Check("metrics", True, f"{name} unset: s3lora serve sets it, vllm serve does not")
    if not Path(folder).is_dir():
        return Check("metrics", False, f"{name}={folder} is not a folder", essential=False)
    stale = any(Path(folder).iterdir())
    detail = f"{folder} holds files of an earlier run: wipe it" if stale else folder
    return Check("metrics", not stale, detail, essential=False)


def device() -> Check:
    """The device that scores modules; for `doctor` only, since torch takes seconds to import."""
    import torch

    from s3lora_serve.spectral import resolve_device

    try:
        chosen = load_settings().device
    except SettingInvalid:  # another check reports it
        chosen = "auto"
    if resolve_device(chosen) == "cpu":
        return Check("device", True, f"S3LORA_DEVICE={chosen}: modules are scored on the CPU")
    if not torch.cuda.is_available():
        problem = "no CUDA device: modules would be scored on the CPU"
        return Check("device", False, f"S3LORA_DEVICE={chosen}: {problem}", essential=False)
    detail = f"{torch.cuda.get_device_name(0)} scores modules"
    return Check("device", True, detail)
