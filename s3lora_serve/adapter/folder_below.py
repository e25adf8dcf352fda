"""Folders that a client names below one folder, and the configuration of the adapter there."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.bounded_json import parse_json
from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.peft_config import MAX_CONFIG_VALUES
from s3lora_serve.adapter.private_copy import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from s3lora_serve.errors import ConfigInvalid, OutsideRoots
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.limits import Limits


def check_name(name: str) -> None:
    """Check that a name can only mean a folder below the one it is looked up in, and is bounded.

    Raises:
        TooLong: it is longer than the name of any adapter.
        OutsideRoots: it is absolute, or a part of it is empty, `.`, `..` or not printable.
    """
    check_lengths(name)
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
    limits = Limits(roots=() if parent is None else (parent,))
    with LocalFolder(folder) as opened:
        if not opened.exists:
            return None
        try:
            text = opened.file(CONFIG_NAME, MAX_CONFIG_BYTES, limits)
            with suppress(FileNotFoundError), opened.opened(WEIGHTS_NAME, limits):
                pass
        except OutsideRoots:
            raise OutsideRoots(f"a link leads from {name!r} out of the resolver's folder") from None
    if text is None:
        return None
    try:
        config = parse_json(text, MAX_CONFIG_VALUES)
    except ValueError as error:
        raise ConfigInvalid(f"adapter_config.json of {name!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigInvalid(f"adapter_config.json of {name!r} is not a JSON object")
    return config
