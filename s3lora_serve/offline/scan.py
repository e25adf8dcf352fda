"""Score an adapter folder and say what the gate would do; nothing is written."""

from pathlib import Path

from s3lora_serve.adapter.remote_storage import RemoteFolder, folder_name, is_url
from s3lora_serve.admission.pipeline import admit
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.policy.file import effective_policy
from s3lora_serve.policy.schema import Policy


def scan_adapter(
    path: str | Path | RemoteFolder, policy: Policy | None = None, device: str = "auto"
) -> Verdict:
    """Verdict on an adapter folder, or on one in a storage; its name is the folder's name.

    `policy=None` means `S3LORA_POLICY`, else the built-in default, the environment over either.
    A bad adapter is a rejected verdict, never an exception.

    Raises:
        PolicyInvalid: the policy file is bad.
        SettingInvalid: an environment variable is bad.
    """
    folder = RemoteFolder(str(path)) if is_url(str(path)) else Path(str(path))
    chosen = effective_policy() if policy is None else policy
    return admit(folder, folder_name(folder), chosen, device=device).verdict
