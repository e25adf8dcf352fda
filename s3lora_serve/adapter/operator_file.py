"""Files that an operator owns: what others than this user and root can write is not trusted."""

import os
import stat
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


def is_private_folder(status: os.stat_result) -> bool:
    """Whether it is a folder of this user, which nobody else can enter."""
    closed = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    return closed and status.st_uid == os.getuid()


def check_contents(descriptor: int, path: Path, limit: int) -> os.stat_result:
    """What an opened file is.

    Raises:
        ValueError: not a regular file, or larger than `limit` bytes.
        OSError: nobody can tell.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{path}: larger than {limit} bytes")
    return status


def contents(descriptor: int, path: Path, limit: int, *, owned: bool) -> bytearray:
    """The contents of an opened file, which is then closed. `path` names it in errors.

    Raises:
        ValueError: it is of another kind, larger than `limit` bytes, or changes meanwhile; with
            `owned`, also if others can write it.
        OSError: it cannot be read.
    """
    try:
        status = check_contents(descriptor, path, limit)
        if owned and (problem := foreign_writer(status, path)):
            raise ValueError(problem)
        data = bytearray(status.st_size)
        with open(descriptor, "rb", closefd=False) as file:
            if file.readinto(data) != len(data) or file.read(1):
                raise ValueError(f"{path} changed while it was read")
    finally:
        os.close(descriptor)
    return data
