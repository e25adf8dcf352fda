"""Write a PEFT adapter without its stripped modules, and as its plan transforms the others.

All other tensors stay bit-identical.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.adapter.reader import Adapter, Module
from s3lora_serve.adapter.safetensors_format import Entry, write_header
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.offline.provenance import PROVENANCE_NAME, statement
from s3lora_serve.plans.schema import Plan
from s3lora_serve.policy.file import effective_policy
from s3lora_serve.policy.file_digests import with_file_digests
from s3lora_serve.policy.schema import Policy


def strip_adapter(
    source: str | Path,
    target: str | Path,
    policy: Policy | None = None,
    device: str = "auto",
    plan: Plan | None = None,
) -> Verdict:
    """Decide on `source` and write it to the new folder `target` without the stripped modules.

    Transformed modules are written with B' = B·T. `plan` replaces one in the policy's folder.

    Nothing is written if the adapter is rejected or no module would remain. The folder appears
    complete or not at all, and contains an in-toto statement of its provenance.

    Raises:
        PolicyInvalid, SettingInvalid: the policy or the environment is invalid.
        FileExistsError: `target` exists.
    """
    folder, written = Path(source), Path(target)
    chosen = effective_policy() if policy is None else with_file_digests(policy)
    if os.path.lexists(written):
        raise FileExistsError(f"{written} exists; name a folder that does not")
    admission = admit(
        folder,
        folder.absolute().name,
        chosen,
        device=device,
        circumstances=Circumstances(plan=plan),
    )
    adapter, verdict = admission.adapter, admission.verdict
    kept = [module for module in verdict.modules if not module.stripped]
    if adapter is None or verdict.decision == "rejected" or not kept:
        return verdict
    staging = Path(tempfile.mkdtemp(prefix=f".{written.name}-", dir=written.absolute().parent))
    try:
        new = admission.weights.replaced if admission.weights else {}
        changed = {name: data for name, (_, data) in new.items()}
        write_adapter(adapter, verdict.stripped, staging, verdict.removed, changed)
        source_facts = {
            WEIGHTS_NAME: adapter.copy.digest,
            CONFIG_NAME: hashlib.sha256(adapter.copy.config).hexdigest(),
        }
        provenance = json.dumps(statement(verdict, source_facts, staging), indent=2)
        (staging / PROVENANCE_NAME).write_text(provenance + "\n")
        staging.chmod(0o755)
        staging.rename(written)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return verdict


def write_adapter(
    adapter: Adapter,
    without: Iterable[str],
    folder: Path,
    removed: Iterable[str] = (),
    changed: Mapping[str, memoryview] | None = None,
) -> None:
    """Write config and weights into an existing folder, without the named modules and tensors.

    A layer's experts get B = 0 instead. `changed` has the new bytes of some tensors by their names.
    """
    names = set(without)
    stripped = [module for module in adapter.modules if module.name in names]
    experts = [module for module in stripped if module.is_expert]
    changed = dict(changed or {}) | _without_experts(adapter, experts, changed or {})
    dropped = set(removed) | {
        key for module in stripped if not module.is_expert for key in module.keys
    }
    kept = [entry for entry in adapter.header.entries if entry.name not in dropped]
    kept.sort(key=lambda entry: entry.start)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(write_header(_packed(kept), adapter.header.metadata))
        for entry in kept:
            own = adapter.copy.weights[entry.start : entry.end]
            file.write(changed.get(entry.name, own))
    config = adapter.copy.config
    if dropped:
        kept_names = [
            module.name
            for module in adapter.modules
            if module.expert is None and (module.is_expert or module.name not in names)
        ]
        config = _config_of(kept_names, config, saves=bool(set(adapter.unscorable) - dropped))
    (folder / CONFIG_NAME).write_bytes(config)


def _without_experts(
    adapter: Adapter, experts: Iterable[Module], changed: Mapping[str, memoryview]
) -> dict[str, memoryview]:
    """The tensors with B = 0 for these experts, by name."""
    entries = {entry.name: entry for entry in adapter.header.entries}
    new: dict[str, memoryview] = {}
    for module in experts:
        key = module.keys[1]
        entry = entries[key]
        if key not in new:
            own = changed.get(key, adapter.copy.weights[entry.start : entry.end])
            new[key] = memoryview(bytearray(own))
        # As bytes, which are 0 for 0 in every dtype.
        B = torch.frombuffer(new[key], dtype=torch.uint8).reshape(*entry.shape, -1)
        module.part("B", B).zero_()
    return new


def _config_of(kept: list[str], config: bytes, *, saves: bool) -> bytes:
    """The configuration for the kept modules. `saves`: whether tensors of modules_to_save remain.

    PEFT creates a new layer for each module that `target_modules` matches and the file lacks. Some
    of PEFT's initialisations of such a layer change the base model's weights, so `target_modules`
    lists exactly the kept modules.
    """
    fields = json.loads(config)
    fields["target_modules"] = kept
    if not saves and "modules_to_save" in fields:
        fields["modules_to_save"] = None
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _packed(entries: Iterable[Entry]) -> Iterator[tuple[Entry, int]]:
    position = 0
    for entry in entries:
        yield entry, position
        position += entry.end - entry.start
