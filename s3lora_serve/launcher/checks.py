"""Checks whether a server started in this environment would be guarded; vLLM is not imported.

`doctor` prints them. `serve` does not start a server if an essential check fails.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from s3lora_serve.errors import PlansInvalid, S3LoRAError, SettingInvalid
from s3lora_serve.launcher.check import Check
from s3lora_serve.launcher.front_end import front_end
from s3lora_serve.launcher.resolvers import resolvers
from s3lora_serve.plans.folder import PLAN_NAME, check_plans
from s3lora_serve.policy.file import serving_policy
from s3lora_serve.settings import load_settings
from s3lora_serve.signatures.trust import check_trusted
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
    yield from _plans()
    yield from _reference()
    yield from _statistics()
    yield from _signers()
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


def _plans() -> Iterator[Check]:
    """The folder of plans, if the policy is valid and not off; its files are read at admissions."""
    try:
        policy = serving_policy()
        check_plans(policy)
    except S3LoRAError as error:
        if isinstance(error, PlansInvalid):
            yield Check("plans", False, str(error))
        return
    if policy.plans is None or policy.mode == "off":
        return
    names = [file.name for file in policy.plans.iterdir()]
    unread = sorted(name for name in names if not PLAN_NAME.fullmatch(name))
    detail = f"{len(names) - len(unread)} in {policy.plans}"
    if policy.require_plan:
        detail += ", and no adapter without one"
    if unread:
        detail += f"; {unread[0][:80]!r} is not <sha256 of the weights>.json and is never read"
    yield Check("plans", not unread, detail, essential=False)


def _reference() -> Iterator[Check]:
    """The alignment reference of a valid policy that has one, and whether others can write it."""
    try:
        policy = serving_policy()
    except S3LoRAError:
        return
    if policy.scorer.reference is None or policy.mode == "off":
        return
    from s3lora_serve.admission.scoring import check_reference  # torch takes seconds to import

    try:
        check_reference(policy)
    except S3LoRAError as error:
        yield Check("reference", False, str(error))
        return
    yield Check("reference", True, f"{policy.scorer.reference}, for {policy.scorer.name}")


def _statistics() -> Iterator[Check]:
    """The statistics of a valid policy that repairs adapters, and whether others can write them."""
    try:
        policy = serving_policy()
    except S3LoRAError:
        return
    if policy.repair is None or policy.mode == "off":
        return
    from s3lora_serve.admission.repairing import check_statistics  # torch takes seconds to import

    try:
        check_statistics(policy)
    except S3LoRAError as error:
        yield Check("statistics", False, str(error))
        return
    detail = f"{policy.repair.statistics}, λ {policy.repair.strength:g}"
    yield Check("statistics", True, detail)


def _signers() -> Iterator[Check]:
    """The signers that a valid policy trusts, and whether their files can be used."""
    try:
        policy = serving_policy()
    except S3LoRAError:
        return
    each = (policy, *policy.variants())
    if policy.mode == "off" or not any(p.signatures.anyone or p.attestations.keys for p in each):
        return
    try:
        check_trusted(policy)
    except S3LoRAError as error:
        yield Check("signers", False, str(error))
        return
    signers, attestations = policy.signatures, policy.attestations
    count = sum(map(len, (signers.keys, signers.certificates, signers.identities)))
    detail = f"{count} for adapters{', required' if signers.require else ''}"
    detail += (
        f"; {len(attestations.keys)} for verdicts{', required' if attestations.require else ''}"
    )
    yield Check("signers", True, detail)


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
