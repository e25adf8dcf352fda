"""Files of an adapter's folder besides its own two: signatures, and all that they cover."""

from collections.abc import Collection, Iterator

from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import FilesUnsigned, OverLimit
from s3lora_serve.policy.schema import Limits

MAX_FILES = 10_000
"""Files of one folder. Ours: checkpoints hold some twenty."""


def other_files(
    folder: LocalFolder | RemoteFolder, left_out: Collection[str], limits: Limits
) -> Iterator[tuple[str, bytes]]:
    """The other files of an adapter's folder and its folders, as relative paths and contents.

    Raises:
        NotAnAdapter, OutsideRoots, ChangedWhileCopying: as for the adapter's own files.
        FilesUnsigned: a folder cannot be read, or is a link; a name leads elsewhere.
        OverLimit: they have more bytes than limits.max_bytes, or are more than MAX_FILES.
    """
    size = 0
    for count, name in enumerate(folder.names()):
        if name in left_out:
            continue
        if count > MAX_FILES:
            raise OverLimit(f"{folder} holds more than {MAX_FILES} files")
        if not {"", ".", ".."}.isdisjoint(name.split("/")):  # possible in object storage
            raise FilesUnsigned(f"{folder} holds {name[:200]!r}, which is no path in a folder")
        data = folder.file(name, limits.max_bytes - size, limits)
        if data is not None:
            size += len(data)
            yield name, data
