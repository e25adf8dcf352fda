"""The digest of plain data: policies, plans and configurations are known by it."""

import hashlib
import json


def canonical_digest(data: object) -> str:
    """sha256 of the canonical JSON: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
