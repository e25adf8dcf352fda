"""A copy of an operator's large file that a server's processes map: they share its memory.

The operator's own file is not mapped: one that is cut short in place would kill whoever reads it.
"""

import hashlib
import mmap
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from s3lora_serve.adapter.operator_file import OPEN_FLAGS, check_contents, is_private_folder

SUFFIX = ".copy"


def shared_copy(source: Path, digest: str, most: int, folder: Path) -> mmap.mmap | None:
    """The bytes with this digest, mapped from a copy in `folder`; None if there can be no copy.

    A copy is made if there is none, and anew if it is damaged. Copies of other files are removed;
    processes that map one keep it.

    Raises:
        ValueError: the source is no regular file, is larger than `most` bytes, or has another
            digest.
    """
    target = folder / (digest.removeprefix("sha256:") + SUFFIX)
    try:
        _prepare(folder)
        for is_new in (False, True):
            if is_new or not target.exists():
                _copy(source, most, target)
            data = _mapped(target)
            if data is None:
                return None
            found = "sha256:" + hashlib.sha256(data).hexdigest()
            if found == digest:
                return data
            data.close()
            target.unlink()
    except OSError:
        return None
    raise ValueError(f"{source} is {found}; {digest} was expected")


def _prepare(folder: Path) -> None:
    """Make the folder and the one that it is in, or check that they are this user's alone.

    Raises:
        OSError: they are not.
    """
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        if not is_private_folder(each.lstat()):
            raise PermissionError(f"{each} can be entered by others than this user")


def _copy(source: Path, most: int, target: Path) -> None:
    with os.fdopen(os.open(source, OPEN_FLAGS), "rb") as file:
        check_contents(file.fileno(), source, most)
        with NamedTemporaryFile(dir=target.parent) as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            with suppress(FileExistsError):  # another process has made it
                os.link(copy.name, target)
    for other in target.parent.glob(f"*{SUFFIX}"):
        if other != target:
            other.unlink(missing_ok=True)


def _mapped(path: Path) -> mmap.mmap | None:
    """The file's bytes; None if it has none. Pages are shared: nobody writes to them."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return None
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
