"""The files of an audit log (PATH, PATH.1 … PATH.keep, newest first), and its writers' lock.

A link at PATH is followed, so that lock and rotated files lie beside the file itself and all who
name it, by whichever link, share them.
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
"""A writer holds it for less than a millisecond; an engine's loop must not wait for a stuck one."""

_POLL_SECONDS = 0.002
APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT
_COMMON = os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe would wait for its other end


def real(path: Path) -> Path:
    """Where the log lies, links resolved."""
    return Path(os.path.realpath(path))


def numbered(path: Path, number: int) -> Path:
    """The file that was rotated away `number` rotations ago."""
    return path.with_name(f"{path.name}.{number}")


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a log; readers take it shared and make no lock file.

    Raises:
        TimeoutError: somebody else held it all the time.
        OSError: there is no right to it, or no room.
    """
    descriptor = _take(path.with_name(path.name + ".lock"), shared)
    try:
        yield
    finally:
        # Closing alone would leave it to a child that was forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def opened(path: Path, flags: int = APPENDING) -> Iterator[int]:
    """A descriptor of one file of a log; to append with, it is made if missing.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def readable(path: Path) -> Iterator[list[tuple[str, BinaryIO, int]]]:
    """Name, stream and size of each kept file, oldest first, as they are at one moment.

    Nothing is held up while they are read: what writers do later is beyond the sizes.

    Raises:
        OSError: the log is missing, or a file of it cannot be read.
    """
    path = real(path)
    with ExitStack() as stack:
        with ExitStack() as moment:
            # A copy of a log has no lock, and its reader may have no right to one.
            with suppress(FileNotFoundError, PermissionError):
                moment.enter_context(locked(path, shared=True))
            files: list[tuple[str, BinaryIO, int]] = []
            for file in [*(numbered(path, n) for n in _rotated(path)), path]:
                stream = stack.enter_context(os.fdopen(_open(file, os.O_RDONLY), "rb"))
                files.append((str(file), stream, os.fstat(stream.fileno()).st_size))
        yield files


def rotate(path: Path, keep: int) -> None:
    """Number the log's files up by one; what would be beyond `keep` is dropped.

    Killed at any point, it leaves the order of the files as it was.

    Raises:
        OSError: the folder cannot be written.
    """
    for number in count(max(keep, 1)):  # more than one where the policy used to keep more
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
    """Write at the end of a file, all or nothing as far as the disk lets us.

    Raises:
        OSError: it could not be written; what was is cut off again.
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
            # A lock file that was deleted or replaced meanwhile keeps nobody out.
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
    """Numbers of the rotated files there are, oldest first; a gap is no fault by itself."""
    number = re.compile(re.escape(path.name) + r"\.([1-9]\d{0,8})", re.ASCII)
    found = (number.fullmatch(file.name) for file in path.parent.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)
