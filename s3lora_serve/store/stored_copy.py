"""A stored copy: the files of one decided adapter, in a folder named by their digest."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.private_copy import (
    CONFIG_NAME,
    OWN_FOLDER,
    WEIGHTS_NAME,
    PrivateCopy,
    mapped,
)
from s3lora_serve.admission.verdict import Verdict, is_refused
from s3lora_serve.errors import StoreDamaged

VERDICT_NAME = "verdict.json"


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """One decided adapter in the store; `copy` is None if no part of it may be served."""

    path: Path
    verdict: Verdict  # without name and path: registrants of equal content share the copy
    copy: PrivateCopy | None

    def verdict_for(self, name: str, path: str) -> Verdict:
        """The verdict with the name and path of one of its registrants."""
        return replace(self.verdict, name=name, path=path)


def own_folder(path: Path) -> Path:
    """The folder, in a stored copy or the copy itself, with the files as their owner wrote them."""
    own = path / OWN_FOLDER
    return own if own.is_dir() else path


def is_servable(verdict: Verdict) -> bool:
    """Whether the adapter may be loaded: it has scores and is not refused."""
    return bool(verdict.modules) and not is_refused(verdict)


def stored_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as the store keeps it: without name and path, which are its registrant's."""
    return replace(verdict, name="", path="").as_json()


def store_key(verdict: Verdict) -> str:
    """sha256, as hex, of the content, of all that enforcement obeys, and of what is said of it.

    The message of a refusal may name its registrant's path. It is in the key, so that a stored
    verdict never tells it to anybody else.
    """
    obeyed = [
        verdict.digest,
        verdict.config_digest,
        verdict.config_file_digest,
        verdict.policy_digest,
        verdict.mode,
        verdict.decision.value,
        verdict.reason and asdict(verdict.reason),
        verdict.scorer,
        verdict.scored_by,
        sorted(verdict.stripped),
        sorted(verdict.removed),
        sorted(verdict.unscored),
        sorted(verdict.left_out),
        verdict.plan_digest,
        verdict.served_digest,
        sorted(verdict.transformed),
        sorted(verdict.projected),
        sorted(verdict.repaired),
        verdict.repair and asdict(verdict.repair),
        verdict.signed_by and asdict(verdict.signed_by),
        verdict.attested_by and asdict(verdict.attested_by),
    ]
    return hashlib.sha256(
        json.dumps(obeyed, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def open_stored_copy(path: Path) -> StoredCopy:
    """Read a stored copy and check every byte against the name of its folder.

    Raises:
        StoreDamaged: it is missing, unreadable, or not what was admitted.
    """
    verdict = read_verdict(path)
    with _damage_of(path):
        copy = _read_copy(path) if is_servable(verdict) else None
        os.utime(path)
    if copy is not None and not _matches(copy, verdict):
        raise StoreDamaged(f"{path} does not hold what it is named after")
    return StoredCopy(path, verdict, copy)


def read_verdict(path: Path) -> Verdict:
    """Read the verdict of a stored copy and check it against the name of its folder.

    Raises:
        StoreDamaged: as `open_stored_copy`; the adapter's files are not looked at.
    """
    with _damage_of(path):
        verdict = Verdict.from_json(json.loads((path / VERDICT_NAME).read_bytes()))
        key = store_key(verdict)
    if path.name.partition("-")[0] != key:
        raise StoreDamaged(f"{path} does not hold what it is named after")
    return verdict


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Raise what a damaged stored copy's files lead to as StoreDamaged."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise StoreDamaged(f"{path}: {type(error).__name__}") from None
    except OSError as error:  # this process cannot read it; the copy itself may be intact
        raise StoreDamaged(f"{path}: {error.strerror}") from None


def _read_copy(path: Path) -> PrivateCopy:
    weights = mapped(path / WEIGHTS_NAME)
    digest = "sha256:" + hashlib.sha256(weights).hexdigest()
    return PrivateCopy((path / CONFIG_NAME).read_bytes(), weights, digest)


def _matches(copy: PrivateCopy, verdict: Verdict) -> bool:
    config = "sha256:" + hashlib.sha256(copy.config).hexdigest()
    return (copy.digest, config) == (verdict.served_digest, verdict.config_file_digest)
