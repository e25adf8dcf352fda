"""Take a private copy of an adapter, which its owner cannot change, before any check reads it.

The bytes of this copy are checked, scored and served. Later changes to the adapter folder (edits,
truncation, deletion) have no effect on them.
"""

import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Self

from s3lora_serve.adapter.local_folder import (
    LocalFolder,
    chunks,
    fill,
    opened_folder,
    size_within,
)
from s3lora_serve.errors import FormatNotAllowed, GateFailed, NotAnAdapter
from s3lora_serve.policy.limits import Limits

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OWN_FOLDER = "own"
"""In a copy whose weights a plan has changed: the folder with the adapter's own two files."""

OTHER_FORMATS = ("adapter_model.bin", "adapter_model.pt")

ADAPTER_FILES = frozenset({CONFIG_NAME, WEIGHTS_NAME, *OTHER_FORMATS})
"""A folder that holds one of these is treated as an adapter, so that missing files are reported."""

MAX_CONFIG_BYTES = 2**20
"""PEFT writes a few kilobytes, and target_modules of the largest models stay far below this."""


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


def copy_adapter(
    folder: Path | LocalFolder, limits: Limits, into: Path | None = None
) -> PrivateCopy:
    """Copy an adapter into memory, or into the folder `into`, from which it is mapped privately.

    Raises:
        NotAnAdapter, FormatNotAllowed: a file is missing or is not a regular file.
        OverLimit: a file is larger than allowed; it is not read.
        OutsideRoots: limits.roots is set and the folder or a file, links resolved, lies under none
            of them.
        ChangedWhileCopying: a file was written to during the copy.
        GateFailed: the copy cannot be written.
    """
    with opened_folder(folder) as source:
        source.check(limits)
        config = source.file(CONFIG_NAME, MAX_CONFIG_BYTES, limits)
        if config is None:
            raise NotAnAdapter(f"{source} has no {CONFIG_NAME}")
        try:
            with source.opened(WEIGHTS_NAME, limits) as weights:
                return _copied(config, weights, limits.max_bytes, into)
        except FileNotFoundError:
            other = [name for name in OTHER_FORMATS if source.has(name)]
            if other:
                raise FormatNotAllowed(
                    f"{source} holds {other[0]} in place of {WEIGHTS_NAME}"
                ) from None
            raise NotAnAdapter(f"{source} has no {WEIGHTS_NAME}") from None


def _copied(config: bytes, source: int, most: int, into: Path | None) -> PrivateCopy:
    size = size_within(source, most)
    if into is None:
        buffer = bytearray(size)
        return PrivateCopy(config, memoryview(buffer), fill(source, memoryview(buffer)))
    try:
        (into / CONFIG_NAME).write_bytes(config)
        digest = hashlib.sha256()
        with (into / WEIGHTS_NAME).open("xb", buffering=0) as target:
            for chunk in chunks(source, size):
                digest.update(chunk)
                _write_whole(target, chunk)
        return PrivateCopy(config, mapped(into / WEIGHTS_NAME), "sha256:" + digest.hexdigest())
    except OSError as error:  # of the store's disk: the adapter is not the cause
        raise GateFailed(f"no private copy in {into}: {error.strerror}") from None


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
