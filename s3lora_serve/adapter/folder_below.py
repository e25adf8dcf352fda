"""Folders that a client names below one folder, and the configuration of the adapter there."""

import json
import os
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.private_copy import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    read_file,
)
from s3lora_serve.errors import ConfigInvalid, OutsideRoots, OverLimit

MAX_NAME_CHARACTERS = 256
"""Ours: longer than any hub id with a folder below it."""


def check_name(name: str) -> None:
    """Check that a name can only mean a folder below the one it is looked up in, and is bounded.

    Raises:
        OverLimit: it is longer than MAX_NAME_CHARACTERS.
        OutsideRoots: it is absolute, or a part of it is empty, `.`, `..` or not printable.
    """
    if len(name) > MAX_NAME_CHARACTERS:
        raise OverLimit(
            f"the model name has {len(name)} characters, over the limit of {MAX_NAME_CHARACTERS}"
        )
    if not name.isprintable() or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise OutsideRoots(f"the model name {name!r} is no path below the resolver's folder")


def config_below(parent: Path | None, folder: Path, name: str) -> dict[str, Any] | None:
    """The adapter_config.json of a folder; None if the folder or the file does not exist.

    With `parent`, the folder and its two files must lie below it, links resolved. Nothing waits
    for a writer, as opening a named pipe would.

    Raises:
        OutsideRoots: the folder or a file lies elsewhere.
        NotAnAdapter, OverLimit, ChangedWhileCopying, ConfigInvalid: the file is no regular file,
            too large, changing, or not a JSON object.
    """
    if parent is not None:
        real = parent.resolve()
        if not all(
            Path(os.path.realpath(path)).is_relative_to(real)
            for path in (folder, folder / WEIGHTS_NAME)
        ):
            raise _leads_out(name)
    try:
        text = read_file(folder / CONFIG_NAME, (parent,) if parent else (), MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return None
    except OutsideRoots:
        raise _leads_out(name) from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigInvalid(f"adapter_config.json of {name!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigInvalid(f"adapter_config.json of {name!r} is not a JSON object")
    return config


def _leads_out(name: str) -> OutsideRoots:
    return OutsideRoots(f"a link leads from {name!r} out of the resolver's folder")
