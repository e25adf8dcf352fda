"""Files of an adapter's folder besides its own two: signatures, and all that they cover."""

from collections.abc import Iterator

from s3lora_serve.adapter.local_folder import MAX_FILES, LocalFolder
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import FilesUnsigned, OverLimit


def file_names(folder: LocalFolder | RemoteFolder) -> Iterator[str]:
    """The files in an adapter's folder and its folders, as relative paths.

    Raises:
        FilesUnsigned: a folder cannot be read, or is a link; a name leads elsewhere.
        OverLimit: they are more than MAX_FILES.
    """
    for count, name in enumerate(folder.names()):
        if count >= MAX_FILES:
            raise OverLimit(f"{folder} holds more than {MAX_FILES} files")
        if not {"", ".", ".."}.isdisjoint(name.split("/")):  # possible in object storage
            raise FilesUnsigned(f"{folder} holds {name[:200]!r}, which is no path in a folder")
        yield name
