"""Take a private copy of an adapter, out of its owner's reach, before anything looks at it.

Whatever happens to the folder afterwards (edits, truncation, deletion), the bytes that are checked,
scored and served are the bytes of this copy.
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
OTHER_FORMATS = ("adapter_model.bin", "adapter_model.pt")

ADAPTER_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME, *OTHER_FORMATS})
"""A folder that holds one of these is taken for an adapter, if only to say what it lacks."""

MAX_CONFIG_BYTES = 2**20
"""PEFT writes a few kilobytes; target_modules of the largest models stay far below this."""

CHUNK_BYTES = 4 * 2**20
"""Copied and hashed at a time: larger than any read-ahead, smaller than the last-level cache."""


@dataclass(frozen=True, slots=True)
class PrivateCopy:
    """The two files of an adapter, in memory that only this process can write."""

    config: bytes
    weights: memoryview
    digest: str  # sha256 of the weights file


class PrivateFolder:
    """A folder that only this user can enter, made when asked for, gone at the end of the block.

    What vLLM has mapped from it stays readable: the mapping holds the file.
    """

    def __init__(self, parent: Callable[[], Path]) -> None:
        """Plan a folder; under which one is asked when it is made."""
        self._parent = parent
        self.path: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def make(self) -> Path:
        """Make the folder now, unless it has been made.

        Raises:
            GateFailed: there is no room or no right to.
        """
        if self.path is None:
            parent = self._parent()
            try:
                self.path = Path(tempfile.mkdtemp(prefix="copy-", dir=parent))
            except OSError as error:
                raise GateFailed(f"no private copy in {parent}: {error.strerror}") from None
        return self.path


def copy_adapter(folder: Path, limits: Limits, into: Path | None = None) -> PrivateCopy:
    """Copy an adapter into memory, or into the folder `into` (mapped privately from there).

    Raises:
        NotAnAdapter, FormatNotAllowed: a file is missing or is not a regular file.
        OverLimit: a file is larger than allowed; nothing larger is ever read.
        OutsideRoots: the policy names roots and a file lies under none of them, links resolved.
        ChangedWhileCopying: the file was written to meanwhile.
    """
    if not folder.is_dir():
        raise NotAnAdapter(f"{folder} is not a folder")
    config = _read_config(folder / CONFIG_NAME, limits.roots)
    try:
        with _opened(folder / WEIGHTS_NAME, limits.roots) as source:
            if into is None:
                buffer = bytearray(_size_within(source, limits.max_bytes))
                return PrivateCopy(config, memoryview(buffer), _copy(source, memoryview(buffer)))
            (into / CONFIG_NAME).write_bytes(config)
            return _copy_to_file(source, into / WEIGHTS_NAME, config, limits.max_bytes)
    except FileNotFoundError:
        other = [name for name in OTHER_FORMATS if (folder / name).exists()]
        if other:
            raise FormatNotAllowed(
                f"{folder} holds {other[0]} in place of {WEIGHTS_NAME}"
            ) from None
        raise NotAnAdapter(f"{folder} has no {WEIGHTS_NAME}") from None


def _read_config(path: Path, roots: Sequence[Path]) -> bytes:
    try:
        with _opened(path, roots) as source:
            buffer = bytearray(_size_within(source, MAX_CONFIG_BYTES))
            _copy(source, memoryview(buffer))
            return bytes(buffer)
    except FileNotFoundError:
        raise NotAnAdapter(f"{path.parent} has no {CONFIG_NAME}") from None


@contextmanager
def _opened(path: Path, roots: Sequence[Path]) -> Iterator[int]:
    """A descriptor of a regular file that lies under one of the roots, if there are any."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
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
    """Check where something really lies, links resolved.

    Raises:
        OutsideRoots: there are roots, and it lies under none of them.
    """
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise OutsideRoots(f"{real} lies under none of limits.roots")


def _real_path(descriptor: int, path: Path) -> Path:
    """Where the opened file really lies; asked of the descriptor, a link cannot be swapped."""
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
    """Fill `target` from the file and return the digest of what was read."""
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
    """Write all of it, or raise: a disk that fills up takes a part first."""
    while data:
        data = data[target.write(data) or 0 :]


def mapped(path: Path) -> memoryview:
    """A private, copy-on-write mapping: what is done to it never reaches the file."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(bytearray())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _check_unchanged(before: os.stat_result, after: os.stat_result, copied: int) -> None:
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if copied != before.st_size or not same:
        raise ChangedWhileCopying(f"the file changed while it was copied ({copied} bytes in)")
