"""The digests of the files that a policy names and obeys, which are part of the policy.

Every process that reads the policy notes the files that it will use. One that is exchanged later
has another digest and is refused.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.schema import Policy


def with_file_digests(policy: Policy) -> Policy:
    """The policy with the digests of its alignment reference and of its statistics.

    Raises:
        PolicyInvalid: a file cannot be read, or has another digest than the policy says.
    """
    changes: dict[str, object] = {}
    scorer, repair = policy.scorer, policy.repair
    if scorer.reference is not None:
        digest = _checked("scorer.reference", scorer.reference, scorer.reference_digest)
        changes["scorer"] = scorer.model_copy(update={"reference_digest": digest})
    if repair is not None:
        digest = _checked("repair.statistics", repair.statistics, repair.statistics_digest)
        changes["repair"] = repair.model_copy(update={"statistics_digest": digest})
    return policy.model_copy(update=changes) if changes else policy


def _checked(key: str, file: Path, expected: str | None) -> str:
    try:
        status = file.stat()
        digest = _digest(
            file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
    except OSError as error:
        raise PolicyInvalid(f"{key}: {file}: {error.strerror or error}") from None
    if expected not in (None, digest):
        raise PolicyInvalid(f"{key}: {file} is {digest}, the policy says {expected}")
    return digest


@lru_cache(maxsize=8)
def _digest(file: Path, *_identity: int) -> str:
    with file.open("rb") as opened:
        return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
