"""Asks a guarded server over HTTP."""

import json
import urllib.error
import urllib.request
from typing import Any

SECONDS = 600
"""A server that serves a thousand adapters decides on each of them before it answers."""


class ServerSilent(Exception):
    """The server did not give the answer; the text says why."""


def recheck(url: str, key: str | None) -> dict[str, Any]:
    """What the server's policy in force decides on the adapters it serves.

    Raises:
        ServerSilent: nobody answers there, the key is wrong, or no gate is up.
    """
    if not url.startswith(("http://", "https://")):
        raise ServerSilent(f"{url}: expected http://HOST:PORT")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(  # noqa: S310 - http or https, see above
        f"{url.rstrip('/')}/s3lora/recheck", method="POST", headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        told = error.read(300).decode(errors="replace")
        raise ServerSilent(f"{url} answered {error.code}: {told}") from None
    except (OSError, ValueError) as error:
        raise ServerSilent(f"{url}: {error}") from None
    if not isinstance(found, dict) or "adapters" not in found:
        raise ServerSilent(f"{url} is no guarded server: it answered {str(found)[:100]}")
    return found
