"""Score an adapter folder and say what the gate would do; nothing is written."""

from pathlib import Path

from s3lora_serve.admission import admit
from s3lora_serve.policy import Policy
from s3lora_serve.policy_file import effective_policy
from s3lora_serve.storage import StoredFolder, is_url, name_of
from s3lora_serve.verdict import Verdict


def scan_adapter(
    path: str | Path | StoredFolder, policy: Policy | None = None, device: str = "auto"
) -> Verdict:
    """Verdict on an adapter folder, or on one in a storage; its name is the folder's name.

    `policy=None` means `S3LORA_POLICY`, else the built-in default, the environment over either.
    A bad adapter is a rejected verdict, never an exception.

    Raises:
        PolicyInvalid: the policy file is bad.
        SettingInvalid: an environment variable is bad.
    """
    folder = StoredFolder(str(path)) if is_url(str(path)) else Path(str(path))
    chosen = effective_policy() if policy is None else policy
    return admit(folder, name_of(folder), chosen, device=device).verdict
