"""The digest of the alignment reference that a policy names, which is part of the policy.

Every process that reads the policy notes the file that it will use. One that is exchanged later has
another digest and is refused.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.schema import Policy


def with_reference_digest(policy: Policy) -> Policy:
    """The policy with the digest of its reference, if it names one.

    Raises:
        PolicyInvalid: the file cannot be read, or has another digest than the policy says.
    """
    file = policy.scorer.reference
    if file is None:
        return policy
    try:
        status = file.stat()
        digest = _digest(
            file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
    except OSError as error:
        raise PolicyInvalid(f"scorer.reference: {file}: {error.strerror or error}") from None
    expected = policy.scorer.reference_digest
    if expected not in (None, digest):
        raise PolicyInvalid(f"scorer.reference: {file} is {digest}, the policy says {expected}")
    scorer = policy.scorer.model_copy(update={"reference_digest": digest})
    return policy.model_copy(update={"scorer": scorer})


@lru_cache(maxsize=8)
def _digest(file: Path, *_identity: int) -> str:
    with file.open("rb") as opened:
        return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
