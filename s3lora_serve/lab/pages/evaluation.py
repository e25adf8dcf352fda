"""A sweep as a self-contained page: attack success rate and utility by setting."""

from s3lora_serve.lab.evaluation.results import Sweep
from s3lora_serve.pages.html import html_of


def sweep_page(sweep: Sweep) -> str:
    """The page as HTML without scripts. It loads no other file and needs no network."""
    return html_of("sweep.html", __package__, sweep=sweep)
