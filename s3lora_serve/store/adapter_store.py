"""The store of admitted adapters: stored copies, each in a folder named by its digest.

The name is the digest of content and verdict together. The process that decided hands the name to
the workers, and a worker trusts no file in the folder that does not hash to it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path

from s3lora_serve.adapter.operator_file import is_private_folder
from s3lora_serve.adapter.private_copy import OWN_FOLDER, WEIGHTS_NAME, PrivateFolder
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import GateFailed, StoreDamaged
from s3lora_serve.store.eviction import Candidate, choose_evicted, folder_size, move_aside
from s3lora_serve.store.process_pins import ProcessPins
from s3lora_serve.store.size_index import SizeIndex
from s3lora_serve.store.stored_copy import (
    VERDICT_NAME,
    is_servable,
    open_stored_copy,
    store_key,
    stored_json,
)

_NAME = re.compile(r"([0-9a-f]{64})(-\d{1,9})?")
_QUARANTINED = ".quarantined"


class AdapterStore:
    """One user's stored copies, shared by the processes of that user's servers."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / f"s3lora-{os.getuid()}"
        self._pins = ProcessPins(self.root)
        self._sizes = SizeIndex(self.root / "sizes", lambda name: folder_size(self.root / name))

    def prepare(self) -> None:
        """Create the folder, or check that it belongs to this user alone and can be locked.

        Raises:
            GateFailed: no space, no permission, or the folder belongs to another user.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise GateFailed(f"no store in {self.root}: {error.strerror}") from None
        self._check_owner()
        with self._pins.store_lock():
            pass

    def process_folder(self) -> Path:
        """The folder of this process; other processes remove it after this one has ended.

        Raises:
            GateFailed: as `prepare`.
        """
        try:
            self.prepare()
            return self._pins.folder()
        except GateFailed:
            if self.root.is_dir():
                raise
        self.prepare()  # a server that ended removed the store at that moment
        return self._pins.folder()

    def _check_owner(self) -> None:
        try:
            status = self.root.lstat()
        except OSError as error:
            raise GateFailed(f"no store in {self.root}: {error.strerror}") from None
        if not is_private_folder(status):
            raise GateFailed(f"the store {self.root} can be entered by others than this user")

    def new_private_folder(self) -> PrivateFolder:
        """A folder for a private copy, on the same file system as the stored copies."""
        return PrivateFolder(self.process_folder)

    def close(self, *, clear: bool) -> None:
        """Drop the pins of this process and remove what ended processes left.

        `clear` also removes all stored copies, unless a living process may serve them.

        Raises:
            GateFailed: the store cannot be locked.
        """
        self._pins.close()
        if not self.root.exists():
            return
        self._check_owner()
        with self._pins.store_lock():
            if not self._pins.living_processes() and clear:
                shutil.rmtree(self.root, ignore_errors=True)

    def add(self, private: PrivateFolder, verdict: Verdict, max_bytes: int) -> Path:
        """Store a decided private copy, pin it, and return its path.

        For an adapter that may not be served only the verdict is stored. Least recently used
        copies that no process serves are evicted to make room.

        Raises:
            StoreFull: there is no room beside the copies that are served.
            GateFailed: the copy cannot be written.
        """
        folder = private.make()
        evicted: list[Path] = []
        try:
            if not is_servable(verdict):
                (folder / WEIGHTS_NAME).unlink(missing_ok=True)
                shutil.rmtree(folder / OWN_FOLDER, ignore_errors=True)
            (folder / VERDICT_NAME).write_text(json.dumps(stored_json(verdict)))
            size, key = folder_size(folder), store_key(verdict)
            intact = self._intact(key)  # reads the whole copy, so not under the lock
            with self._pins.store_lock():
                target = self._free_or_intact_path(key, intact)
                if target.is_dir():
                    os.utime(target)
                else:
                    evicted = self._make_room(size, max_bytes)
                    self._sizes.record(target.name, size)
                    folder.rename(target)
                self._pins.pin(target.name)
        except OSError as error:
            raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None
        finally:
            for old in evicted:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def unpin(self, path: Path) -> None:
        """Drop one pin of this process; other processes may still hold theirs."""
        self._pins.unpin(path.name)

    def _paths(self, key: str) -> Iterator[Path]:
        """The paths for content of this key. A quarantined path is never used again."""
        names = (f"{key}-{generation}" if generation else key for generation in count())
        return (path for name in names if not self.is_quarantined(path := self.root / name))

    def _intact(self, key: str) -> int | None:
        """Which folder holds an intact copy of this key, by its inode; None if none does."""
        target = next(self._paths(key))
        try:
            folder = target.stat().st_ino
            open_stored_copy(target)
        except (OSError, StoreDamaged):
            return None
        return folder

    def _free_or_intact_path(self, key: str, intact: int | None) -> Path:
        """The path of a copy, or for one; what is not the `intact` folder is looked at again."""
        target = next(self._paths(key))
        if target.is_dir() and target.stat().st_ino != intact:
            try:
                open_stored_copy(target)
            except StoreDamaged:
                shutil.rmtree(target, ignore_errors=True)
        return target

    def _make_room(self, size: int, max_bytes: int) -> list[Path]:
        """Move least recently used copies aside until `size` more bytes fit; return them.

        The copies themselves are looked at only if some have to go.
        """
        names = os.listdir(self.root)  # noqa: PTH208 - names alone, of thousands of copies
        marks = [name for name in names if name.endswith(_QUARANTINED)]
        sizes = self._sizes.sizes([name for name in names if _NAME.fullmatch(name)])
        full = sum(sizes.values()) + size > max_bytes
        if not marks and not full:
            self._pins.living_processes()  # removes what dead ones left
            return []
        served = self._pins.pinned()
        for mark in marks:
            if mark.removesuffix(_QUARANTINED) not in served:
                (self.root / mark).unlink(missing_ok=True)
        if not full:
            return []
        candidates = [Candidate.of(self.root / name, size) for name, size in sizes.items()]
        evicted = choose_evicted(candidates, served, size, max_bytes)
        return move_aside(evicted, self._pins.folder())

    def agree_on(self, topic: str, proposal: Path) -> Path:
        """The first proposal on a topic, for all processes; later proposals are unpinned.

        Raises:
            GateFailed: the agreement cannot be written.
        """
        name = self.root / f"ruling-{hashlib.sha256(topic.encode()).hexdigest()}"
        for _ in range(2):
            try:
                name.symlink_to(proposal.name)
            except FileExistsError:
                first = self.root / name.readlink()
                if first == proposal:
                    return proposal
                if first.is_dir() and not self.is_quarantined(first):
                    self._pins.pin(first.name)
                    self.unpin(proposal)
                    return first
                name.unlink(missing_ok=True)  # the copy that it names no longer exists
            except OSError as error:
                raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None
            else:
                break
        return proposal

    def find(self, path: str) -> Path | None:
        """The path itself if it is a stored copy's, else None."""
        return _stored_path(self.root, path)

    def quarantine(self, path: Path) -> None:
        """Mark a stored copy as quarantined, for every process, until no process serves it.

        Raises:
            GateFailed: the mark cannot be written.
        """
        try:
            path.with_name(path.name + _QUARANTINED).touch(mode=0o600)
        except OSError as error:
            raise GateFailed(f"no room in the store {self.root}: {error.strerror}") from None

    def is_quarantined(self, path: Path) -> bool:
        """Whether any process has quarantined the stored copy at this path."""
        return os.path.exists(f"{path}{_QUARANTINED}")  # noqa: PTH110 - called for every block of tokens


@lru_cache(maxsize=4096)
def _stored_path(root: Path, path: str) -> Path | None:
    found = Path(path)
    return found if found.parent == root and _NAME.fullmatch(found.name) else None
