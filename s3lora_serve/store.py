"""Admitted adapters: private copies that are served, each in a folder named by what was decided.

The name is the digest of content and ruling together. A worker is handed the name by the process
that decided and believes nothing in the folder that does not hash to it.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from s3lora_serve.errors import ConfigInvalid, GateFailed, StoreDamaged
from s3lora_serve.intake import CONFIG_NAME, WEIGHTS_NAME, PrivateCopy, PrivateFolder, mapped
from s3lora_serve.peft_config import parse_config
from s3lora_serve.verdict import Verdict, refused

VERDICT_NAME = "verdict.json"
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Kept:
    """One decided adapter in the store; `copy` is None where nothing of it may be served."""

    path: Path
    verdict: Verdict
    copy: PrivateCopy | None


class Store:
    """Folder of one user's admitted adapters, shared by the processes of its servers."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / f"s3lora-{os.getuid()}"

    def prepare(self) -> None:
        """Make the folder, or check that the one there is ours alone.

        Raises:
            GateFailed: there is no room or right to, or it belongs to somebody else.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.root.lstat()
        except OSError as error:
            raise GateFailed(f"no store in {self.root}: {error.strerror}") from None
        alone = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if not alone or status.st_uid != os.getuid():
            raise GateFailed(f"the store {self.root} can be entered by others than this user")

    def fresh(self) -> PrivateFolder:
        """A folder to take a copy in, on the same file system as what is kept."""
        return PrivateFolder(self.root, before=self.prepare)

    def keep(self, private: PrivateFolder, verdict: Verdict) -> Path:
        """Keep a decided copy under the digest of content and ruling; return where it now lies.

        Of what may not be served only the verdict is kept.

        Raises:
            GateFailed: it cannot be written.
        """
        folder = private.make()
        try:
            if not servable(verdict):
                (folder / WEIGHTS_NAME).unlink(missing_ok=True)
            (folder / VERDICT_NAME).write_text(json.dumps(verdict.as_json()))
            target = self.root / key(verdict)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
        except OSError as error:
            raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None
        return target

    def agree(self, topic: str, proposal: Path) -> Path:
        """Of several proposals on one topic the first stands, for all processes.

        Raises:
            GateFailed: the agreement cannot be written.
        """
        name = self.root / f"ruling-{hashlib.sha256(topic.encode()).hexdigest()}"
        for _ in range(2):
            try:
                name.symlink_to(proposal.name)
            except FileExistsError:
                standing = self.root / name.readlink()
                if standing.is_dir():
                    return standing
                name.unlink(missing_ok=True)  # what it names is gone
            except OSError as error:
                raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None
            else:
                break
        return proposal

    def find(self, path: str) -> Path | None:
        """The path itself if it is the store's, else None."""
        found = Path(path)
        return found if found.parent == self.root and _KEY.fullmatch(found.name) else None

    def open(self, path: Path) -> Kept:
        """What is kept at a path, every byte of it checked against the path's name.

        Raises:
            StoreDamaged: it is gone, or is not what was admitted; what is left is put aside.
        """
        try:
            verdict = Verdict.from_json(json.loads((path / VERDICT_NAME).read_bytes()))
            copy = _copy(path) if servable(verdict) else None
            sound = key(verdict) == path.name and (copy is None or _is_whole(copy, verdict))
        except (FileNotFoundError, ValueError, KeyError, TypeError, ConfigInvalid) as error:
            self._put_aside(path)
            raise StoreDamaged(f"{path}: {type(error).__name__}") from None
        except OSError as error:  # this process cannot read it now, which is no fault of the copy
            raise StoreDamaged(f"{path}: {error.strerror}") from None
        if not sound:
            self._put_aside(path)
            raise StoreDamaged(f"{path} does not hold what it is named after")
        return Kept(path, verdict, copy)

    def _put_aside(self, path: Path) -> None:
        """Make room for a registration to bring the adapter anew."""
        shutil.rmtree(path, ignore_errors=True)


def key(verdict: Verdict) -> str:
    """Digest of the content and of everything about the decision that enforcement obeys."""
    obeyed = [
        verdict.digest,
        verdict.config_digest,
        verdict.policy_digest,
        verdict.mode,
        verdict.decision.value,
        verdict.reason and verdict.reason.code,
        sorted(verdict.stripped),
        sorted(verdict.removed),
        sorted(verdict.unscored),
    ]
    return hashlib.sha256(json.dumps(obeyed, separators=(",", ":")).encode()).hexdigest()


def servable(verdict: Verdict) -> bool:
    """Whether anything of the adapter may be loaded: what has scores, and is not refused."""
    return bool(verdict.modules) and not refused(verdict)


def _is_whole(copy: PrivateCopy, verdict: Verdict) -> bool:
    config = parse_config(copy.config, on_unscorable="admit").digest
    return (copy.digest, config) == (verdict.digest, verdict.config_digest)


def _copy(path: Path) -> PrivateCopy:
    weights = mapped(path / WEIGHTS_NAME)
    digest = "sha256:" + hashlib.sha256(weights).hexdigest()
    return PrivateCopy((path / CONFIG_NAME).read_bytes(), weights, digest)
