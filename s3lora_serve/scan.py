"""Score an adapter folder and say what the gate would do; nothing is written."""

from pathlib import Path

from s3lora_serve.admission import admit
from s3lora_serve.policy import Policy
from s3lora_serve.policy_file import effective_policy
from s3lora_serve.verdict import Verdict


def scan_adapter(path: str | Path, policy: Policy | None = None, device: str = "auto") -> Verdict:
    """Verdict on an adapter folder; its name is the folder's name.

    `policy=None` means `S3LORA_POLICY`, else the built-in default, the environment over either.
    A bad adapter is a rejected verdict, never an exception.

    Raises:
        PolicyInvalid: the policy file is bad.
        SettingInvalid: an environment variable is bad.
    """
    folder = Path(path)
    chosen = effective_policy() if policy is None else policy
    return admit(folder, folder.absolute().name, chosen, device=device).verdict
