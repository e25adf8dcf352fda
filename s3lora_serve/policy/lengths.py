"""Bounds on what tenants choose: the names and paths of adapters."""

from s3lora_serve.errors import TooLong

MAX_NAME = 256
"""Characters of an adapter's name. Ours: a folder's name has at most 255 bytes."""

MAX_PATH = 4096
"""Characters of an adapter's path: Linux's PATH_MAX."""

_SHOWN = 40


def check_lengths(name: str, path: str = "") -> None:
    """Check a name and a path before anything matches, logs or keeps them.

    Raises:
        TooLong: one of them is too long; the message has its beginning alone.
    """
    for kind, text, most in (("name", name, MAX_NAME), ("path", path, MAX_PATH)):
        if len(text) > most:
            raise TooLong(f"the {kind} {text[:_SHOWN]!r}… has {len(text)} characters, over {most}")
