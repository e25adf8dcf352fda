"""The summary of a whole registry as one self-contained HTML page."""

from s3lora_serve.errors import meanings
from s3lora_serve.lab.sweeps.registry_summary import OUTLYING, RegistrySummary
from s3lora_serve.pages.html import html_of

MAX_ROWS = 200
"""Maximum number of tenants and of outliers on the page, the worst first. The table has all."""


def registry_page(registry: RegistrySummary) -> str:
    """The page as HTML without scripts. It loads no other file and needs no network."""
    return html_of(
        "registry.html",
        __package__,
        registry=registry,
        outliers=registry.outliers(),
        tenants=registry.tenants(),
        meanings=meanings(),
        bound=OUTLYING,
        most_rows=MAX_ROWS,
    )
