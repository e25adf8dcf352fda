"""The files of an audit log (PATH, PATH.1 … PATH.keep, newest first), and its writers' lock.

If PATH is a link, it is resolved. The lock and the rotated files lie beside the real file, so
processes that use different links share them.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

LOCK_SECONDS = 1.0
"""Maximum wait for the lock. A writer holds it for less than a millisecond, and an engine's loop
must not wait for a stuck writer."""

_POLL_SECONDS = 0.002
APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT
_COMMON = os.O_CLOEXEC | os.O_NONBLOCK  # otherwise opening a pipe waits for its other end


def real(path: Path) -> Path:
    """The real path of the log, with links resolved."""
    return Path(os.path.realpath(path))


def numbered(path: Path, number: int) -> Path:
    """The path of the file that was rotated `number` rotations ago."""
    return path.with_name(f"{path.name}.{number}")


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a log. Readers hold it shared and create no lock file.

    Raises:
        TimeoutError: other processes held the lock for LOCK_SECONDS.
        OSError: no permission or no space.
    """
    descriptor = _take(path.with_name(path.name + ".lock"), shared)
    try:
        yield
    finally:
        # If it is only closed, a child that was forked meanwhile still holds the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def opened(path: Path, flags: int = APPENDING) -> Iterator[int]:
    """A descriptor of one file of a log. A missing file is created if `flags` is APPENDING.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def readable(path: Path) -> Iterator[list[tuple[str, BinaryIO, int]]]:
    """Name, stream and size of each kept file at one moment, oldest first.

    The lock is not held while the files are read: later writes lie beyond the sizes.

    Raises:
        OSError: the log is missing, or one of its files cannot be read.
    """
    path = real(path)
    with ExitStack() as stack:
        with ExitStack() as moment:
            # A copied log has no lock file, and a reader may lack the permission to open one.
            with suppress(FileNotFoundError, PermissionError):
                moment.enter_context(locked(path, shared=True))
            files: list[tuple[str, BinaryIO, int]] = []
            for file in [*(numbered(path, n) for n in _rotated(path)), path]:
                stream = stack.enter_context(os.fdopen(_open(file, os.O_RDONLY), "rb"))
                files.append((str(file), stream, os.fstat(stream.fileno()).st_size))
        yield files


def rotate(path: Path, keep: int) -> None:
    """Increase the number of each of the log's files by one, and delete those beyond `keep`.

    If the process is killed at any point, the order of the files is unchanged.

    Raises:
        OSError: the folder cannot be written.
    """
    for number in count(max(keep, 1)):  # several if `audit.keep` was larger before
        try:
            numbered(path, number).unlink()
        except FileNotFoundError:
            break
    free = next(number for number in count(1) if not numbered(path, number).exists())
    for number in range(free, 1, -1):
        numbered(path, number - 1).rename(numbered(path, number))
    if keep:
        path.rename(numbered(path, 1))
    else:
        path.unlink()


def append(descriptor: int, data: bytes) -> None:
    """Append all of `data` to a file, or nothing if the disk still allows truncation.

    Raises:
        OSError: a write failed. The part that was written is cut off again.
    """
    # No fsync: an engine must not wait for a disk, and the chain shows what a power cut lost.
    size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _take(lock: Path, shared: bool) -> int:
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        descriptor = os.open(lock, flags | os.O_NOFOLLOW | _COMMON, 0o600)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            # A lock on a file that was deleted or replaced meanwhile excludes no other process.
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > give_up:
            problem = f"held by another process for {LOCK_SECONDS:g} s"
            raise TimeoutError(errno.ETIMEDOUT, problem, str(lock))
        time.sleep(_POLL_SECONDS)


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | _COMMON, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _rotated(path: Path) -> list[int]:
    """The numbers of the rotated files, oldest first. A gap alone is not an error."""
    number = re.compile(re.escape(path.name) + r"\.([1-9]\d{0,8})", re.ASCII)
    found = (number.fullmatch(file.name) for file in path.parent.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)
