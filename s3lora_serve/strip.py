"""Write a PEFT adapter without its stripped modules; what is kept stays bit for bit."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from s3lora_serve.adapter import Adapter
from s3lora_serve.admission import admit
from s3lora_serve.intake import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.policy import Policy
from s3lora_serve.policy_file import effective_policy
from s3lora_serve.safetensors_format import Entry, write_header
from s3lora_serve.verdict import Verdict


def strip_adapter(
    source: str | Path, target: str | Path, policy: Policy | None = None, device: str = "auto"
) -> Verdict:
    """Decide on `source` and write it to the new folder `target` without the stripped modules.

    Nothing is written when it is rejected, or when no module would be left. The folder appears
    whole or not at all.

    Raises:
        PolicyInvalid, SettingInvalid: the policy or the environment is bad.
        FileExistsError: `target` exists.
    """
    folder, written = Path(source), Path(target)
    chosen = effective_policy() if policy is None else policy
    if written.exists():
        raise FileExistsError(f"{written} exists; name a folder that does not")
    admission = admit(folder, folder.absolute().name, chosen, device=device)
    adapter, verdict = admission.adapter, admission.verdict
    kept = [module for module in verdict.modules if not module.stripped]
    if adapter is None or verdict.decision == "rejected" or not kept:
        return verdict
    staging = Path(tempfile.mkdtemp(prefix=f".{written.name}-", dir=written.absolute().parent))
    try:
        write_adapter(adapter, verdict.stripped, staging, verdict.removed)
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
    (folder / CONFIG_NAME).write_bytes(adapter.copy.config)


def _packed(entries: Iterable[Entry]) -> Iterator[tuple[Entry, int]]:
    position = 0
    for entry in entries:
        yield entry, position
        position += entry.end - entry.start
