"""Take a private copy of an adapter, which its owner cannot change, before any check reads it.

The bytes of this copy are checked, scored and served. Later changes to the adapter folder (edits,
truncation, deletion) have no effect on them.
"""

import hashlib
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Self

from s3lora_serve.errors import (
    ChangedWhileCopying,
    FormatNotAllowed,
    GateFailed,
    NotAnAdapter,
    OutsideRoots,
    OverLimit,
)
from s3lora_serve.policy.schema import Limits

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OWN_FOLDER = "own"
"""In a copy whose weights a plan has changed: the folder with the adapter's own two files."""

OTHER_FORMATS = ("adapter_model.bin", "adapter_model.pt")

ADAPTER_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME, *OTHER_FORMATS})
"""A folder that holds one of these is treated as an adapter, so that missing files are reported."""

MAX_CONFIG_BYTES = 2**20
"""PEFT writes a few kilobytes, and target_modules of the largest models stay far below this."""

CHUNK_BYTES = 4 * 2**20
"""Bytes copied and hashed at a time: more than any read-ahead, less than the last-level cache."""


@dataclass(frozen=True, slots=True)
class PrivateCopy:
    """The two files of an adapter, in memory that only this process can write."""

    config: bytes
    weights: memoryview
    digest: str  # sha256 of the weights file


class PrivateFolder:
    """A folder that only this user can enter. `make` creates it; the `with` block's end deletes it.

    A file that vLLM has mapped from it stays readable, because the mapping keeps the file.
    """

    def __init__(self, parent: Callable[[], Path]) -> None:
        """Keep `parent`, which `make` calls to get the parent folder."""
        self._parent = parent
        self.path: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def make(self) -> Path:
        """Create the folder if it does not exist yet, and return its path.

        Raises:
            GateFailed: no space or no permission.
        """
        if self.path is None:
            parent = self._parent()
            try:
                self.path = Path(tempfile.mkdtemp(prefix="copy-", dir=parent))
            except OSError as error:
                raise GateFailed(f"no private copy in {parent}: {error.strerror}") from None
        return self.path


def copy_adapter(folder: Path, limits: Limits, into: Path | None = None) -> PrivateCopy:
    """Copy an adapter into memory, or into the folder `into`, from which it is mapped privately.

    Raises:
        NotAnAdapter, FormatNotAllowed: a file is missing or is not a regular file.
        OverLimit: a file is larger than allowed; it is not read.
        OutsideRoots: limits.roots is set and a file, links resolved, lies under none of them.
        ChangedWhileCopying: a file was written to during the copy.
        GateFailed: the copy cannot be written.
    """
    if not folder.is_dir():
        raise NotAnAdapter(f"{folder} is not a folder")
    try:
        config = read_file(folder / CONFIG_NAME, limits.roots, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise NotAnAdapter(f"{folder} has no {CONFIG_NAME}") from None
    try:
        with _opened(folder / WEIGHTS_NAME, limits.roots) as source:
            if into is None:
                buffer = bytearray(_size_within(source, limits.max_bytes))
                return PrivateCopy(config, memoryview(buffer), _copy(source, memoryview(buffer)))
            try:
                (into / CONFIG_NAME).write_bytes(config)
                return _copy_to_file(source, into / WEIGHTS_NAME, config, limits.max_bytes)
            except OSError as error:  # of the store's disk: the adapter is not the cause
                raise GateFailed(f"no private copy in {into}: {error.strerror}") from None
    except FileNotFoundError:
        other = [name for name in OTHER_FORMATS if (folder / name).exists()]
        if other:
            raise FormatNotAllowed(
                f"{folder} holds {other[0]} in place of {WEIGHTS_NAME}"
            ) from None
        raise NotAnAdapter(f"{folder} has no {WEIGHTS_NAME}") from None


def read_file(path: Path, roots: Sequence[Path], most: int) -> bytes:
    """The contents of a file of an adapter.

    Raises:
        FileNotFoundError: it does not exist.
        NotAnAdapter, OutsideRoots, OverLimit, ChangedWhileCopying: as `copy_adapter`.
    """
    with _opened(path, roots) as source:
        buffer = bytearray(_size_within(source, most))
        _copy(source, memoryview(buffer))
        return bytes(buffer)


@contextmanager
def _opened(path: Path, roots: Sequence[Path]) -> Iterator[int]:
    """Open a regular file that lies under one of the roots, if there are any."""
    try:
        # Without O_NONBLOCK, opening a named pipe can wait for a writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotAnAdapter(f"{path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAnAdapter(f"{path} is not a regular file")
        check_roots(_real_path(descriptor, path), roots)
        yield descriptor
    finally:
        os.close(descriptor)


def check_roots(real: Path, roots: Sequence[Path]) -> None:
    """Check that a path, whose links are resolved, lies under one of the roots.

    Raises:
        OutsideRoots: there are roots, and the path lies under none of them.
    """
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise OutsideRoots(f"{real} lies under none of limits.roots")


def _real_path(descriptor: int, path: Path) -> Path:
    """The real path of the opened file, from its descriptor, so a swapped link has no effect."""
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:  # not Linux
        return path.resolve()


def _size_within(descriptor: int, most: int) -> int:
    size = os.fstat(descriptor).st_size
    if size > most:
        raise OverLimit(f"the file has {size} bytes, over the limit of {most}")
    return size


def _copy(source: int, target: memoryview) -> str:
    """Fill `target` from the file and return the digest of the bytes read."""
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


def _copy_to_file(source: int, path: Path, config: bytes, most: int) -> PrivateCopy:
    size = _size_within(source, most)
    before, digest, position = os.fstat(source), hashlib.sha256(), 0
    chunk = memoryview(bytearray(min(CHUNK_BYTES, size)))
    with path.open("xb", buffering=0) as target:
        while position < size:
            read = os.preadv(source, [chunk[: size - position]], position)
            if not read:
                break
            digest.update(chunk[:read])
            _write_whole(target, chunk[:read])
            position += read
        _check_unchanged(before, os.fstat(source), position)
    return PrivateCopy(config, mapped(path), "sha256:" + digest.hexdigest())


def _write_whole(target: RawIOBase, data: memoryview) -> None:
    """Write all of `data`, or raise. When a disk fills up, one write may store only a part."""
    while data:
        data = data[target.write(data) or 0 :]


def mapped(path: Path) -> memoryview:
    """A private, copy-on-write mapping of a file. Writes to it never reach the file."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(bytearray())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _check_unchanged(before: os.stat_result, after: os.stat_result, copied: int) -> None:
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if copied != before.st_size or not same:
        raise ChangedWhileCopying(f"the file changed while it was copied ({copied} bytes in)")
