"""Read adapters from storage that fsspec opens (s3://, gs://, hf://, https://, memory://).

Credentials and endpoints come from the settings of fsspec and its backends.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import has_magic, url_to_fs

from s3lora_serve.adapter.private_copy import (
    ADAPTER_FILES,
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    OTHER_FORMATS,
    WEIGHTS_NAME,
    PrivateCopy,
)
from s3lora_serve.errors import (
    ChangedWhileCopying,
    DeadlinePassed,
    FormatNotAllowed,
    NotAnAdapter,
    OutsideRoots,
    OverLimit,
    StorageFailed,
)
from s3lora_serve.policy.limits import Limits

BLOCK_BYTES = 16 * 2**20
"""Bytes in one read: few requests for an adapter, and little memory besides the adapter's own."""

VERSION_KEYS = frozenset(
    {"size", "etag", "mtime", "lastmodified", "last_modified", "md5hash", "generation", "created"}
)
"""Keys of a backend's object information whose values differ between versions of an object."""


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """An adapter folder in such storage."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def real_path(self) -> str:
        """What the policy's rules match: the URL."""
        return self.url

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.url.rstrip("/").rpartition("/")[2]

    def copy(self, limits: Limits) -> PrivateCopy:
        """Stream the adapter into memory. An object over its size limit is not requested.

        Raises:
            NotAnAdapter, FormatNotAllowed: an object is missing, or is not one of a known size.
            OverLimit: an object is larger than allowed.
            OutsideRoots: the policy sets limits.roots, which are folders of this machine.
            ChangedWhileCopying: an object was replaced during the copy.
            DeadlinePassed: the copy took longer than limits.download_seconds.
        """
        if limits.roots:
            raise OutsideRoots(f"{self.url} lies under none of limits.roots")
        check_deadline = _deadline(limits)
        fs, folder = self._opened()
        config = self._streamed(fs, folder, CONFIG_NAME, MAX_CONFIG_BYTES, check_deadline)
        weights = self._streamed(fs, folder, WEIGHTS_NAME, limits.max_bytes, check_deadline)
        if config is None:
            raise NotAnAdapter(f"{self.url} has no {CONFIG_NAME}")
        if weights is None:
            other = [name for name in OTHER_FORMATS if fs.exists(f"{folder}/{name}")]
            if other:
                raise FormatNotAllowed(f"{self.url} holds {other[0]} in place of {WEIGHTS_NAME}")
            raise NotAnAdapter(f"{self.url} has no {WEIGHTS_NAME}")
        return PrivateCopy(bytes(config[0]), *weights)

    def file(self, name: str, most: int, limits: Limits) -> bytes | None:
        """The contents of another object in the folder; None if there is none.

        Raises:
            NotAnAdapter, OverLimit, ChangedWhileCopying, DeadlinePassed: as `copy`.
        """
        found = self._streamed(*self._opened(), name, most, _deadline(limits))
        return None if found is None else bytes(found[0])

    def chunks(self, name: str, most: int, limits: Limits) -> Iterator[bytes]:
        """The contents of another object in the folder, in parts.

        Raises:
            FileNotFoundError: it does not exist.
            NotAnAdapter, OverLimit, ChangedWhileCopying, DeadlinePassed: as `copy`.
        """
        yield from self._object(*self._opened(), name, most, _deadline(limits))[1]

    def names(self) -> Iterator[str]:
        """The objects under the folder, as relative paths."""
        fs, folder = self._opened()
        yield from (path.removeprefix(f"{folder}/") for path in sorted(fs.find(folder)))

    def _opened(self) -> tuple[Any, str]:
        fs, folder = url_to_fs(self.url)
        return fs, folder.rstrip("/")

    def _streamed(
        self, fs: Any, folder: str, name: str, most: int, check_deadline: Callable[[], None]
    ) -> tuple[memoryview, str] | None:
        """The bytes of an object and their digest, or None if the object does not exist."""
        try:
            size, blocks = self._object(fs, folder, name, most, check_deadline)
        except FileNotFoundError:
            return None
        target, digest, position = memoryview(bytearray(size)), hashlib.sha256(), 0
        for block in blocks:
            target[position : position + len(block)] = block
            digest.update(block)
            position += len(block)
        return target, "sha256:" + digest.hexdigest()

    def _object(
        self, fs: Any, folder: str, name: str, most: int, check_deadline: Callable[[], None]
    ) -> tuple[int, Iterator[bytes]]:
        """The size of an object of at most `most` bytes, and its contents in blocks."""
        path = f"{folder}/{name}"
        before = fs.info(path)
        size = before.get("size")
        if before.get("type") != "file" or not isinstance(size, int):
            raise NotAnAdapter(f"{self.url}/{name} is no object of a known size")
        if size > most:
            raise OverLimit(f"{name} has {size} bytes, over the limit of {most}")

        def blocks() -> Iterator[bytes]:
            position = 0
            with fs.open(path, "rb", block_size=BLOCK_BYTES) as source:
                while position < size:
                    check_deadline()
                    block = source.read(min(BLOCK_BYTES, size - position))
                    if not block:
                        break
                    position += len(block)
                    yield block
            if position != size or _version(before) != _version(fs.info(path)):
                raise ChangedWhileCopying(f"{self.url}/{name} changed while it was read")

        return size, blocks()


def _deadline(limits: Limits) -> Callable[[], None]:
    end = time.monotonic() + limits.download_seconds

    def check() -> None:
        if time.monotonic() > end:
            raise DeadlinePassed(f"the download took over {limits.download_seconds:g} s")

    return check


def is_url(given: str) -> bool:
    """Whether a path is a URL, not a path of this machine."""
    return "://" in given


def folder_name(folder: Path | RemoteFolder) -> str:
    """The name of an adapter that has no other name: its folder's."""
    return folder.absolute().name if isinstance(folder, Path) else folder.name


def remote_adapters(url: str) -> Iterator[RemoteFolder]:
    """The adapter folders that a URL leads to, by the rules of `find_adapters`.

    Raises:
        StorageFailed: the storage cannot be listed, or the URL leads to nothing.
    """
    try:
        fs, path = url_to_fs(url)
        starts = fs.glob(path) if has_magic(path) else [path]
        if not starts:
            raise FileNotFoundError(url)
        for start in sorted(starts):
            for found in _under(fs, start):
                yield RemoteFolder(fs.unstrip_protocol(found))
    except Exception as error:  # noqa: BLE001 - each backend raises its own exceptions
        problem = "nothing is there" if isinstance(error, FileNotFoundError) else str(error)
        raise StorageFailed(f"{url}: {problem or type(error).__name__}") from None


def _under(fs: Any, path: str) -> list[str]:
    """The folders that hold a file of an adapter, or the path itself if there are none."""
    path = path.rstrip("/")
    files = (file.rpartition("/") for file in fs.find(path))
    found = {folder for folder, _, name in files if name in ADAPTER_FILES}
    if not found and not fs.exists(path):
        raise FileNotFoundError(path)
    return sorted(found) or [path]


def _version(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key.lower() in VERSION_KEYS}
