"""Write a PEFT adapter without its stripped modules; what is kept stays bit for bit."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.adapter.safetensors_format import Entry, write_header
from s3lora_serve.admission.pipeline import admit
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.offline.provenance import PROVENANCE_NAME, statement
from s3lora_serve.policy.file import effective_policy
from s3lora_serve.policy.schema import Policy


def strip_adapter(
    source: str | Path, target: str | Path, policy: Policy | None = None, device: str = "auto"
) -> Verdict:
    """Decide on `source` and write it to the new folder `target` without the stripped modules.

    Nothing is written when it is rejected, or when no module would be left. The folder appears
    whole or not at all, with an in-toto statement of where it comes from.

    Raises:
        PolicyInvalid, SettingInvalid: the policy or the environment is bad.
        FileExistsError: `target` exists.
    """
    folder, written = Path(source), Path(target)
    chosen = effective_policy() if policy is None else policy
    if os.path.lexists(written):
        raise FileExistsError(f"{written} exists; name a folder that does not")
    admission = admit(folder, folder.absolute().name, chosen, device=device)
    adapter, verdict = admission.adapter, admission.verdict
    kept = [module for module in verdict.modules if not module.stripped]
    if adapter is None or verdict.decision == "rejected" or not kept:
        return verdict
    staging = Path(tempfile.mkdtemp(prefix=f".{written.name}-", dir=written.absolute().parent))
    try:
        write_adapter(adapter, verdict.stripped, staging, verdict.removed)
        origin = {
            WEIGHTS_NAME: adapter.copy.digest,
            CONFIG_NAME: hashlib.sha256(adapter.copy.config).hexdigest(),
        }
        told = json.dumps(statement(verdict, origin, staging), indent=2)
        (staging / PROVENANCE_NAME).write_text(told + "\n")
        staging.chmod(0o755)
        staging.rename(written)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return verdict


def write_adapter(
    adapter: Adapter, without: Iterable[str], folder: Path, removed: Iterable[str] = ()
) -> None:
    """Write config and weights into an existing folder, without the named modules and tensors."""
    gone = set(without)
    dropped = set(removed) | {
        key for module in adapter.modules if module.name in gone for key in module.keys
    }
    kept = [entry for entry in adapter.header.entries if entry.name not in dropped]
    kept.sort(key=lambda entry: entry.start)
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(write_header(_packed(kept), adapter.header.metadata))
        for entry in kept:
            file.write(adapter.copy.weights[entry.start : entry.end])
    config = adapter.copy.config
    if dropped:
        names = [module.name for module in adapter.modules if module.name not in gone]
        config = _config_of(names, config, saves=bool(set(adapter.unscorable) - dropped))
    (folder / CONFIG_NAME).write_bytes(config)


def _config_of(kept: list[str], config: bytes, *, saves: bool) -> bytes:
    """The configuration of what is kept.

    PEFT makes a new layer for each module that `target_modules` matches and the file lacks, and
    some ways of initialising those change the base model's weights: it has to name what is there.
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
