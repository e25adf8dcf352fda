"""Find the adapters that folders, parent folders, patterns and URLs lead to."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from s3lora_serve.adapter.private_copy import ADAPTER_FILES
from s3lora_serve.adapter.remote_storage import RemoteFolder, is_url, remote_adapters


def find_adapters(paths: Iterable[str]) -> Iterator[Path | RemoteFolder]:
    """The adapter folders that the paths lead to, in the order of the paths.

    A path to a file of an adapter stands for its folder. A path that does not exist is treated as a
    pattern, in which `**` matches any depth.

    Raises:
        OSError: a path does not exist and matches nothing, or a folder cannot be read.
        StorageFailed: a URL cannot be listed or leads to nothing.
    """
    for given in paths:
        if is_url(given):
            yield from remote_adapters(given)
            continue
        path = Path(given)
        if not os.path.lexists(path) and glob.has_magic(given):
            found = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - may be absolute
            if not found:
                path.stat()  # raises the error to report
            for match in map(Path, found):
                if match.is_dir() or match.name in ADAPTER_FILES:
                    yield from _under(match)
        else:
            path.stat()
            yield from _under(path)


def _under(path: Path) -> Iterator[Path]:
    """The adapter folders under `path`, or `path` itself if it is one or has none under it."""
    if path.name in ADAPTER_FILES and path.is_file():
        path = path.parent
    if not path.is_dir() or any((path / mark).exists() for mark in ADAPTER_FILES):
        yield path
        return
    found = sorted(_walk(path))
    yield from found or [path]


def _walk(top: Path) -> Iterator[Path]:
    """Folders that hold an adapter file. Links are followed; each real folder is visited once."""

    def unreadable(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for name, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if ADAPTER_FILES.intersection(files):
            yield Path(name)
