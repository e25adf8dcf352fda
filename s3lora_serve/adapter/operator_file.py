"""Files that an operator owns: what others than this user and root can write is not trusted."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""For reading. Without O_NONBLOCK a named pipe would wait for a writer."""


def foreign_writer(status: os.stat_result, path: Path) -> str | None:
    """Who else can write a file or folder, in a sentence; None if nobody can."""
    if status.st_uid not in (os.getuid(), 0):
        return (
            f"{path} belongs to user {status.st_uid}, neither to this user {os.getuid()} nor root"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"{path} can be written by others: its mode is {mode:04o}"
    return None


@contextmanager
def regular_file(path: Path) -> Iterator[BufferedReader]:
    """A regular file, opened for reading.

    Raises:
        OSError: it cannot be opened, or is of another kind.
    """
    with os.fdopen(os.open(path, OPEN_FLAGS), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file", str(path))
        yield file
