"""`s3lora recheck`: asks a guarded server which adapters its policy would now decide otherwise."""

import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from s3lora_serve.cli import tables
from s3lora_serve.cli.options import Format, check_url, stop

TIMEOUT_SECONDS = 600
"""A server with a thousand adapters decides on each of them before it answers."""


def recheck(
    url: Annotated[str, typer.Argument(help="A guarded server: http://HOST:PORT.")],
    key: Annotated[
        str | None, typer.Option("--api-key", help="Its API key.", envvar="VLLM_API_KEY")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = (Format.TABLE),
) -> None:
    """Say which served adapters the policy in force would decide otherwise; nothing changes.

    Exit code: 0 none, 1 at least one, or the policy's file was not taken, 2 wrong usage, or the
    server did not answer.
    """
    found = _answer(url, key)
    problem = found.get("policy_problem")
    if form is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
    else:
        tables.print_recheck(found["adapters"])
    if problem:
        typer.echo(f"s3lora: the policy of before is in force: {problem}", err=True)
    changed = any(each["differs"] for each in found["adapters"])
    raise typer.Exit(1 if problem or changed else 0)


def _answer(url: str, key: str | None) -> dict[str, Any]:
    """The server's answer to POST /s3lora/recheck; stops with exit code 2 if there is none."""
    check_url(url)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(  # noqa: S310 - http or https, see above
        f"{url.rstrip('/')}/s3lora/recheck", method="POST", headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        stop(f"{url} answered {error.code}: {error.read(300).decode(errors='replace')}")
    except (OSError, ValueError) as error:
        stop(f"{url}: {error}")
    if not isinstance(found, dict) or "adapters" not in found:
        stop(f"{url} is no guarded server: it answered {str(found)[:100]}")
    return found
