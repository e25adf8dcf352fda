"""One opened adapter folder of this machine; everything is read from its descriptor.

A path is whatever lies there at the moment, and a tenant can swap a link at any. A descriptor stays
with one folder: the path that rules match is that of the folder whose files are read.
"""

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

from s3lora_serve.errors import (
    AdapterRejected,
    ChangedWhileCopying,
    FilesUnsigned,
    GateFailed,
    NotAnAdapter,
    OutsideRoots,
    OverLimit,
)
from s3lora_serve.policy.limits import Limits

CHUNK_BYTES = 4 * 2**20
"""Bytes read and hashed at a time: more than any read-ahead, less than the last-level cache."""

Opened = TypeVar("Opened")

MAX_FILES = 10_000
"""Files and folders of one adapter. Ours: checkpoints hold some twenty."""

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a named pipe can wait for a writer forever.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class LocalFolder:
    """An adapter folder that is opened once. One that cannot be opened is refused when read."""

    def __init__(self, path: Path) -> None:
        """Open the folder at `path`, whose links are followed here and never again."""
        self.path = path
        self.real_path = str(path)  # without links and dots; if unopened, nothing is read of it
        self._descriptor = -1
        self._problem: AdapterRejected | None = None
        try:
            self._descriptor = os.open(path, _FOLDER)
            self.real_path = real_path(self._descriptor)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            self._problem = NotAnAdapter(f"{path} is not a folder")
        except OSError as error:
            self._problem = NotAnAdapter(f"{path}: {error.strerror}")
        except GateFailed as error:
            self._problem = error

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; nothing can be read any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._problem = -1, GateFailed(f"{self.path} is closed")

    @property
    def exists(self) -> bool:
        """Whether there was a folder that could be opened."""
        return self._descriptor >= 0

    def check(self, limits: Limits) -> None:
        """Check that the folder was opened and lies under one of the roots, if there are any.

        Raises:
            NotAnAdapter: it is no folder, or cannot be opened.
            OutsideRoots: it lies under none of limits.roots.
            GateFailed: the system does not tell its path.
        """
        if self._problem is not None:
            raise self._problem
        check_roots(self.real_path, limits.roots)

    def has(self, name: str) -> bool:
        """Whether the folder has an entry of this name."""
        try:
            os.stat(name, dir_fd=self._descriptor)
        except (OSError, ValueError):
            return False
        return True

    @contextmanager
    def opened(self, name: str, limits: Limits) -> Iterator[int]:
        """The descriptor of a regular file that lies, links resolved, under one of the roots.

        Raises:
            FileNotFoundError: it does not exist.
            NotAnAdapter, OutsideRoots, GateFailed: as `check`, for folder and file.
        """
        self.check(limits)
        try:
            descriptor = os.open(name, _FILE, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise NotAnAdapter(f"{self.path / name}: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotAnAdapter(f"{self.path / name} is not a regular file")
            check_roots(real_path(descriptor), limits.roots)
            yield descriptor
        finally:
            os.close(descriptor)

    def file(self, name: str, most: int, limits: Limits) -> bytes | None:
        """The contents of a file of at most `most` bytes; None if there is none.

        Raises:
            NotAnAdapter, OutsideRoots, GateFailed: as `opened`.
            OverLimit, ChangedWhileCopying: it is too large, or is written to meanwhile.
        """
        try:
            with self.opened(name, limits) as source:
                buffer = bytearray(size_within(source, most))
                fill(source, memoryview(buffer))
                return bytes(buffer)
        except FileNotFoundError:
            return None

    def chunks(self, name: str, most: int, limits: Limits) -> Iterator[memoryview]:
        """The contents of a file in parts, each valid until the next.

        Raises:
            FileNotFoundError: it does not exist.
            NotAnAdapter, OutsideRoots, OverLimit, ChangedWhileCopying, GateFailed: as `file`.
        """
        with self.opened(name, limits) as source:
            yield from chunks(source, size_within(source, most))

    def names(self) -> Iterator[str]:
        """All files in the folder and its folders, as relative paths.

        Raises:
            FilesUnsigned: a folder cannot be read, or is a link to one.
            OverLimit: files and folders are more than MAX_FILES.
        """
        folders, count = ["."], 0
        while folders:
            place = folders.pop()
            for name, is_folder in self._entries(place):
                count += 1
                if count > MAX_FILES:
                    raise OverLimit(f"{self.path} holds more than {MAX_FILES} files")
                if is_folder:
                    folders.append(f"{place}/{name}")
                else:
                    yield f"{place}/{name}".removeprefix("./")

    def _entries(self, place: str) -> Iterator[tuple[str, bool]]:
        """The names in a folder within this one, and whether each is a folder's."""
        try:
            descriptor = os.open(place, _LIST, dir_fd=self._descriptor)
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        if entry.is_symlink() and entry.is_dir():
                            link = f"{place}/{entry.name}".removeprefix("./")
                            raise FilesUnsigned(f"{link[:200]!r} is a link to a folder")
                        yield entry.name, entry.is_dir(follow_symlinks=False)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FilesUnsigned(f"{place[:200]!r}: {error.strerror}") from None


@contextmanager
def opened_folder(folder: Path | Opened) -> Iterator[LocalFolder | Opened]:
    """The folder at a path, opened for this block; one that is opened already is left open."""
    if isinstance(folder, Path):
        with LocalFolder(folder) as own:
            yield own
    else:
        yield folder


def check_roots(path: str, roots: Sequence[Path]) -> None:
    """Check that a path, whose links are resolved, lies under one of the roots.

    Raises:
        OutsideRoots: there are roots, and the path lies under none of them.
    """
    if roots and not any(Path(path).is_relative_to(root.resolve()) for root in roots):
        raise OutsideRoots(f"{path} lies under none of limits.roots")


def real_path(descriptor: int) -> str:
    """The path of what is opened, without links.

    Raises:
        GateFailed: the system does not tell it.
    """
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - the text as it is
    except OSError:
        if (query := getattr(fcntl, "F_GETPATH", None)) is None:
            raise GateFailed("paths of opened files are unknown: /proc is not mounted") from None
    return os.fsdecode(fcntl.fcntl(descriptor, query, bytes(1024)).rstrip(b"\0"))  # macOS


def size_within(descriptor: int, most: int) -> int:
    """The size of an opened file.

    Raises:
        OverLimit: it has more than `most` bytes.
    """
    size = os.fstat(descriptor).st_size
    if size > most:
        raise OverLimit(f"the file has {size} bytes, over the limit of {most}")
    return size


def fill(source: int, target: memoryview) -> str:
    """Fill `target` from an opened file and return the digest of the bytes read.

    Raises:
        ChangedWhileCopying: the file has another size, or is written to meanwhile.
    """
    before, digest, position = os.fstat(source), hashlib.sha256(), 0
    while position < len(target):
        chunk = target[position : position + CHUNK_BYTES]
        read = os.preadv(source, [chunk], position)
        if not read:
            break
        digest.update(chunk[:read])
        position += read
    _check_unchanged(before, os.fstat(source), position)
    return "sha256:" + digest.hexdigest()


def chunks(source: int, size: int) -> Iterator[memoryview]:
    """The contents of an opened file of this size, in parts that are valid until the next one.

    Raises:
        ChangedWhileCopying: as `fill`.
    """
    before, position = os.fstat(source), 0
    buffer = memoryview(bytearray(min(CHUNK_BYTES, size)))
    while position < size:
        read = os.preadv(source, [buffer[: size - position]], position)
        if not read:
            break
        yield buffer[:read]
        position += read
    _check_unchanged(before, os.fstat(source), position)


def _check_unchanged(before: os.stat_result, after: os.stat_result, copied: int) -> None:
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if copied != before.st_size or not same:
        raise ChangedWhileCopying(f"the file changed while it was copied ({copied} bytes in)")
