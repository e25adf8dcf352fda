"""Who uses what in the store. Every process has a folder there that it locks for its life, with its
copies in the making and a pin for each adapter it serves: nothing pinned is ever evicted.

The kernel gives the lock back however the process ends, so what a dead one left behind is known as
such, and removed by whoever comes next.
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


class Claims:
    """The claims of this process, and a view of everybody's."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mutex = threading.RLock()
        self._pins: Counter[str] = Counter()
        self._owner = 0  # process id: a forked child makes a folder of its own
        self._folder = root
        self._descriptor = -1

    @contextmanager
    def store_locked(self) -> Iterator[None]:
        """Let one process at a time change what is kept; held for milliseconds.

        Raises:
            GateFailed: the store cannot be locked.
        """
        descriptor = _locked(self._root / _LOCK)
        try:
            yield
        finally:
            os.close(descriptor)

    def leave(self) -> None:
        """Take back all that this process claims, its folder too.

        Raises:
            GateFailed: the store cannot be locked.
        """
        with self._mutex:
            if self._owner != os.getpid():
                return
            with self.store_locked():
                shutil.rmtree(self._folder, ignore_errors=True)
                os.close(self._descriptor)
            self._owner, self._folder = 0, self._root
            self._pins.clear()

    def folder(self) -> Path:
        """The folder of this process, made when first asked for.

        Raises:
            GateFailed: there is no room or no right to.
        """
        with self._mutex:
            if self._owner != os.getpid():
                with self.store_locked():
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
        """Keep an adapter from eviction until it is released as often as it was pinned.

        Raises:
            GateFailed: that cannot be written down.
        """
        folder = self.folder()
        with self._mutex:
            try:
                (folder / f"{_PIN}{name}").touch()
            except OSError as error:
                raise GateFailed(f"no room in the store {self._root}: {error.strerror}") from None
            self._pins[name] += 1

    def release(self, name: str) -> None:
        """Take one pin back."""
        with self._mutex:
            if self._owner != os.getpid() or name not in self._pins:
                return
            self._pins[name] -= 1
            if self._pins[name] <= 0:
                del self._pins[name]
                (self._folder / f"{_PIN}{name}").unlink(missing_ok=True)

    def pinned(self) -> set[str]:
        """What any living process serves; folders of dead ones go. The store must be locked."""
        pins = (pin for folder in self.living() for pin in folder.glob(f"{_PIN}*"))
        return {pin.name.removeprefix(_PIN) for pin in pins}

    def living(self) -> list[Path]:
        """Folders of living processes; those of dead ones go. The store must be locked."""
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
            os.close(descriptor)  # whoever held it removed it: what is there now is to be locked
    except OSError as error:
        raise GateFailed(f"cannot lock {file}: {error.strerror}") from None


def _is_dead(folder: Path) -> bool:
    """Whether nobody holds the lock in a process's folder."""
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
