"""HTML made of verdicts; whatever an adapter's owner chose is escaped, on every page."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict
from s3lora_serve.pages.heat_map import SHADES, heat_map

ROWS = 50
"""Adapters on one page: what an eye goes through before it filters."""


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter in a list."""

    name: str
    decision: str
    stripped: int
    modules: int
    seconds: float  # it took to decide
    time: datetime
    quarantined: bool = False
    code: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """HTML, and the header that lets nothing else on the page run or load."""

    html: str
    policy: str  # Content-Security-Policy


def adapters_page(
    served: Sequence[Row],
    refused: Sequence[Row],
    *,
    query: str,
    number: int,
    mode: str,
    policy_digest: str,
) -> Page:
    """The adapters that are served and those lately refused, those that match a query."""
    found = [row for row in served if query.lower() in row.name.lower()]
    pages = max(1, -(-len(found) // ROWS))
    number = min(max(number, 1), pages)
    return _page(
        "adapters.html",
        rows=found[(number - 1) * ROWS : number * ROWS],
        refused=[row for row in refused if query.lower() in row.name.lower()][:ROWS],
        found=len(found),
        total=len(served),
        query=query,
        number=number,
        pages=pages,
        mode=mode,
        policy_digest=policy_digest,
    )


def adapter_page(verdict: Verdict, chosen: str | None, *, quarantined: bool) -> Page:
    """One adapter: heat map of the index, and the spectrum of a chosen module."""
    modules = {module.name: module for module in verdict.modules}
    return _page(
        "adapter.html",
        verdict=verdict,
        quarantined=quarantined,
        map=heat_map(verdict),
        link=partial(_module_link, verdict.name),
        prefix="",
        chosen=modules.get(chosen or "", _sharpest(verdict)),
    )


def _module_link(adapter: str, module: ModuleVerdict) -> str:
    return "/s3lora/?" + urlencode({"adapter": adapter, "module": module.name}) + "#module"


def _sharpest(verdict: Verdict) -> ModuleVerdict | None:
    return max(verdict.modules, key=lambda module: module.ssi or 0.0, default=None)


def _page(template: str, **values: object) -> Page:
    style, script = _rendered("style.css"), _rendered("refresh.js")
    values |= {"script": Markup(script)}  # noqa: S704 - a file of this package
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return Page(html_of(template, **values), policy)


def html_of(template: str, **values: object) -> str:
    """A page with the one style that all have."""
    style = Markup(_rendered("style.css"))  # noqa: S704 - a file of this package
    return _environment().get_template(template).render(values, style=style)


@cache
def _rendered(file: str) -> str:
    return _environment().get_template(file).render(shades=SHADES)


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the one inline text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("s3lora_serve.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
