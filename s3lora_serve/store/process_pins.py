"""Which process serves which stored copies.

Each process has a folder in the store and holds a lock on it for as long as it runs. The folder
holds unfinished private copies and one pin for each stored copy that the process serves. A pinned
copy is never evicted. The kernel drops the lock when the process ends, in whatever way, and the
next process removes the folders without a lock.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s3lora_serve.errors import GateFailed

_PROCESS = "process-"
_PIN = "pin-"
_LOCK = "lock"


class ProcessPins:
    """The pins of this process, and those of all living processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mutex = threading.RLock()
        self._pins: Counter[str] = Counter()
        self._owner = 0  # process id: a forked child makes its own folder
        self._folder = root
        self._descriptor = -1

    @contextmanager
    def store_lock(self) -> Iterator[None]:
        """Let one process at a time change the stored copies; held for milliseconds.

        Raises:
            GateFailed: the store cannot be locked.
        """
        descriptor = _locked(self._root / _LOCK)
        try:
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Remove the folder of this process, with all its pins.

        Raises:
            GateFailed: the store cannot be locked.
        """
        with self._mutex:
            if self._owner != os.getpid():
                return
            with self.store_lock():
                shutil.rmtree(self._folder, ignore_errors=True)
                os.close(self._descriptor)
            self._owner, self._folder = 0, self._root
            self._pins.clear()

    def folder(self) -> Path:
        """The folder of this process, created on first use.

        Raises:
            GateFailed: no space or no permission.
        """
        with self._mutex:
            if self._owner != os.getpid():
                with self.store_lock():
                    self._make()
            return self._folder

    def _make(self) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=_PROCESS, dir=self._root))
        except OSError as error:
            raise GateFailed(f"no room in the store {self._root}: {error.strerror}") from None
        self._descriptor = _locked(self._folder / _LOCK)
        self._owner = os.getpid()
        self._pins.clear()

    def pin(self, name: str) -> None:
        """Protect a stored copy from eviction until it is unpinned as often as it was pinned.

        Raises:
            GateFailed: the pin cannot be written.
        """
        folder = self.folder()
        with self._mutex:
            try:
                (folder / f"{_PIN}{name}").touch()
            except OSError as error:
                raise GateFailed(f"no room in the store {self._root}: {error.strerror}") from None
            self._pins[name] += 1

    def unpin(self, name: str) -> None:
        """Drop one pin."""
        with self._mutex:
            if self._owner != os.getpid() or name not in self._pins:
                return
            self._pins[name] -= 1
            if self._pins[name] <= 0:
                del self._pins[name]
                (self._folder / f"{_PIN}{name}").unlink(missing_ok=True)

    def pinned(self) -> set[str]:
        """Names of the copies that any living process pins. The store must be locked."""
        pins = (pin for folder in self.living_processes() for pin in folder.glob(f"{_PIN}*"))
        return {pin.name.removeprefix(_PIN) for pin in pins}

    def living_processes(self) -> list[Path]:
        """Folders of living processes; removes those of dead ones. The store must be locked."""
        found = []
        for folder in self._root.glob(f"{_PROCESS}*"):
            if folder != self._folder and _is_dead(folder):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                found.append(folder)
        return found


def _locked(file: Path) -> int:
    """A descriptor that holds the file's lock until it is closed."""
    try:
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its last holder deleted the file: lock the new one
    except OSError as error:
        raise GateFailed(f"cannot lock {file}: {error.strerror}") from None


def _is_dead(folder: Path) -> bool:
    """Whether no process holds the lock of this process folder."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
