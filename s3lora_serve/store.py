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
from functools import lru_cache
from itertools import count
from pathlib import Path

from s3lora_serve.claims import Claims
from s3lora_serve.errors import ConfigInvalid, GateFailed, StoreDamaged
from s3lora_serve.eviction import Entry, folder_size, move_aside, to_evict
from s3lora_serve.intake import CONFIG_NAME, WEIGHTS_NAME, PrivateCopy, PrivateFolder, mapped
from s3lora_serve.peft_config import parse_config
from s3lora_serve.verdict import Verdict, refused

VERDICT_NAME = "verdict.json"
_NAME = re.compile(r"([0-9a-f]{64})(-\d{1,9})?")
_CONDEMNED = ".quarantined"


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
        self._claims = Claims(self.root)

    def prepare(self) -> None:
        """Make the folder, or check that the one there is ours alone and can be locked.

        Raises:
            GateFailed: there is no room or right to, or it belongs to somebody else.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise GateFailed(f"no store in {self.root}: {error.strerror}") from None
        self._check_ours()
        with self._claims.store_locked():
            pass

    def own_folder(self) -> Path:
        """The folder of this process, which others remove once it has ended.

        Raises:
            GateFailed: as of `prepare`.
        """
        try:
            self.prepare()
            return self._claims.folder()
        except GateFailed:
            if self.root.is_dir():
                raise
        self.prepare()  # a server that ended removed the store just then
        return self._claims.folder()

    def _check_ours(self) -> None:
        try:
            status = self.root.lstat()
        except OSError as error:
            raise GateFailed(f"no store in {self.root}: {error.strerror}") from None
        alone = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if not alone or status.st_uid != os.getuid():
            raise GateFailed(f"the store {self.root} can be entered by others than this user")

    def fresh(self) -> PrivateFolder:
        """A folder to take a copy in, on the same file system as what is kept."""
        return PrivateFolder(self.own_folder)

    def leave(self, *, clear: bool) -> None:
        """Take back what this process claims, and remove what processes that ended left behind.

        `clear`: and all that is kept, unless a process lives that may serve it.

        Raises:
            GateFailed: the store cannot be locked.
        """
        self._claims.leave()
        if not self.root.exists():
            return
        self._check_ours()
        with self._claims.store_locked():
            if not self._claims.living() and clear:
                shutil.rmtree(self.root, ignore_errors=True)

    def keep(self, private: PrivateFolder, verdict: Verdict, most: int) -> Path:
        """Keep a decided copy, pinned, under the digest of content and ruling; return where.

        Of what may not be served only the verdict is kept. Least recently used adapters that no
        process serves make room; `most` is in bytes.

        Raises:
            StoreFull: there is no room beside what is served.
            GateFailed: it cannot be written.
        """
        folder = private.make()
        evicted: list[Path] = []
        try:
            if not servable(verdict):
                (folder / WEIGHTS_NAME).unlink(missing_ok=True)
            (folder / VERDICT_NAME).write_text(json.dumps(verdict.as_json()))
            with self._claims.store_locked():
                target = self._vacant_or_sound(key(verdict))
                if target.is_dir():
                    os.utime(target)
                else:
                    evicted = self._make_room(folder_size(folder), most)
                    folder.rename(target)
                self._claims.pin(target.name)
        except OSError as error:
            raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None
        finally:
            for old in evicted:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def release(self, path: Path) -> None:
        """This process no longer serves what it kept there; others may."""
        self._claims.release(path.name)

    def _vacant_or_sound(self, name: str) -> Path:
        """Where content of this name is or may go: a path once condemned never comes back."""
        for generation in count():
            target = self.root / (f"{name}-{generation}" if generation else name)
            if self.is_condemned(target):
                continue
            if target.is_dir():
                try:
                    self.open(target)
                except StoreDamaged:
                    shutil.rmtree(target, ignore_errors=True)
            break
        return target

    def _make_room(self, size: int, most: int) -> list[Path]:
        """Move least recently used adapters aside until `size` more bytes fit; return them."""
        served = self._claims.pinned()
        for mark in self.root.glob(f"*{_CONDEMNED}"):
            if mark.name.removesuffix(_CONDEMNED) not in served:
                mark.unlink(missing_ok=True)
        kept = [path for path in self.root.iterdir() if _NAME.fullmatch(path.name)]
        chosen = to_evict([Entry.of(path) for path in kept], served, size, most)
        return move_aside(chosen, self._claims.folder())

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
                if standing == proposal:
                    return proposal
                if standing.is_dir() and not self.is_condemned(standing):
                    self._claims.pin(standing.name)
                    self.release(proposal)
                    return standing
                name.unlink(missing_ok=True)  # what it names is gone
            except OSError as error:
                raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None
            else:
                break
        return proposal

    def find(self, path: str) -> Path | None:
        """The path itself if it is the store's, else None."""
        return _found(self.root, path)

    def condemn(self, path: Path) -> None:
        """Mark what lies at a path as quarantined, for every process, until nobody serves it.

        Raises:
            GateFailed: the mark cannot be written.
        """
        try:
            path.with_name(path.name + _CONDEMNED).touch(mode=0o600)
        except OSError as error:
            raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None

    def is_condemned(self, path: Path) -> bool:
        """Whether any process has quarantined what lies at a path."""
        return os.path.exists(f"{path}{_CONDEMNED}")  # noqa: PTH110 - asked for every block of tokens

    def open(self, path: Path) -> Kept:
        """What is kept at a path, every byte of it checked against the path's name.

        Raises:
            StoreDamaged: it is gone, cannot be read, or is not what was admitted.
        """
        try:
            verdict = Verdict.from_json(json.loads((path / VERDICT_NAME).read_bytes()))
            copy = _copy(path) if servable(verdict) else None
            named = path.name.partition("-")[0] == key(verdict)
            sound = named and (copy is None or _is_whole(copy, verdict))
            os.utime(path)
        except (FileNotFoundError, ValueError, KeyError, TypeError, ConfigInvalid) as error:
            raise StoreDamaged(f"{path}: {type(error).__name__}") from None
        except OSError as error:  # this process cannot read it now, which is no fault of the copy
            raise StoreDamaged(f"{path}: {error.strerror}") from None
        if not sound:
            raise StoreDamaged(f"{path} does not hold what it is named after")
        return Kept(path, verdict, copy)


@lru_cache(maxsize=4096)
def _found(root: Path, path: str) -> Path | None:
    found = Path(path)
    return found if found.parent == root and _NAME.fullmatch(found.name) else None


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
