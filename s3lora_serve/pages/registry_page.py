"""One self-contained page on a whole registry."""

from s3lora_serve.errors import meanings
from s3lora_serve.offline.registry_summary import OUTLYING, Registry
from s3lora_serve.pages.html import html_of

MAX_ROWS = 200
"""Tenants and outliers on the page, the worst first; a table has all."""


def summary(registry: Registry) -> str:
    """The page as HTML that needs nothing else: no file, no network, no script."""
    return html_of(
        "registry.html",
        registry=registry,
        outliers=registry.outliers(),
        tenants=registry.tenants(),
        meanings=meanings(),
        bound=OUTLYING,
        most_rows=MAX_ROWS,
    )
