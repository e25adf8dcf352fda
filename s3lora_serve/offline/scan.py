"""Score an adapter folder and return the gate's verdict. Nothing is written."""

from pathlib import Path

from s3lora_serve.adapter.remote_storage import RemoteFolder, folder_name, is_url
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.policy.file import effective_policy
from s3lora_serve.policy.file_digests import with_file_digests
from s3lora_serve.policy.schema import Policy


def scan_adapter(
    path: str | Path | RemoteFolder, policy: Policy | None = None, device: str = "auto"
) -> Verdict:
    """The verdict on an adapter folder, local or in remote storage. Its name is the folder's name.

    `policy=None` means the file in `S3LORA_POLICY`, or the built-in default if that is unset;
    environment variables override both. A bad adapter gives a rejected verdict, never an exception.

    Raises:
        PolicyInvalid: the policy file is invalid.
        SettingInvalid: an environment variable is invalid.
    """
    folder = RemoteFolder(str(path)) if is_url(str(path)) else Path(str(path))
    chosen = effective_policy() if policy is None else with_file_digests(policy)
    return admit(folder, folder_name(folder), chosen, device=device).verdict
