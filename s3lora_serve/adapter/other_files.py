"""Files of an adapter's folder besides its own two: signatures, and all that they cover."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from s3lora_serve.adapter.private_copy import read_file
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import FilesUnsigned, OverLimit
from s3lora_serve.policy.schema import Limits

MAX_FILES = 10_000
"""Files of one folder. Ours: checkpoints hold some twenty."""


def small_file(folder: Path | RemoteFolder, name: str, most: int, limits: Limits) -> bytes | None:
    """The contents of a file in an adapter's folder; None if there is none.

    Raises:
        NotAnAdapter, OutsideRoots, ChangedWhileCopying: as for the adapter's own files.
        OverLimit: it is larger than `most` bytes.
    """
    if isinstance(folder, RemoteFolder):
        return folder.file(name, most, limits)
    try:
        return read_file(folder / name, limits.roots, most)
    except FileNotFoundError:
        return None


def other_files(
    folder: Path | RemoteFolder, left_out: Collection[str], limits: Limits
) -> Iterator[tuple[str, bytes]]:
    """The other files of an adapter's folder and its folders, as relative paths and contents.

    Raises:
        NotAnAdapter, OutsideRoots, ChangedWhileCopying: as for the adapter's own files.
        FilesUnsigned: a folder cannot be read, or is a link; a name leads elsewhere.
        OverLimit: they have more bytes than limits.max_bytes, or are more than MAX_FILES.
    """
    size = 0
    names = folder.names() if isinstance(folder, RemoteFolder) else _local_names(folder)
    for count, name in enumerate(names):
        if name in left_out:
            continue
        if count > MAX_FILES:
            raise OverLimit(f"{folder} holds more than {MAX_FILES} files")
        if not {"", ".", ".."}.isdisjoint(name.split("/")):  # possible in object storage
            raise FilesUnsigned(f"{folder} holds {name[:200]!r}, which is no path in a folder")
        data = small_file(folder, name, limits.max_bytes - size, limits)
        if data is not None:
            size += len(data)
            yield name, data


def _local_names(folder: Path) -> Iterator[str]:
    for here, folders, names in os.walk(folder, onerror=_unreadable):
        place = Path(here).relative_to(folder)
        for name in folders:
            if (Path(here) / name).is_symlink():
                raise FilesUnsigned(f"{place / name} is a link to a folder")
        yield from (str(place / name) for name in names)


def _unreadable(error: OSError) -> None:
    raise FilesUnsigned(f"{error.filename}: {error.strerror}")
