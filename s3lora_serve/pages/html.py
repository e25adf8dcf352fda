"""HTML from templates. Text that an adapter's owner chose is escaped on every page."""

import base64
import hashlib
from dataclasses import dataclass
from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from jinja2.filters import do_urlencode
from markupsafe import Markup

from s3lora_serve.pages.heat_map import SHADES
from s3lora_serve.printable import encodable

OWN = "s3lora_serve.pages"
"""The package of the pages of a server, with the parts that all pages share."""


@dataclass(frozen=True, slots=True)
class Page:
    """HTML, and the Content-Security-Policy under which nothing else runs or loads."""

    html: str
    policy: str


def page_of(template: str, **values: object) -> Page:
    """A page of the server, with its script and its Content-Security-Policy."""
    style, script = _rendered("style.css"), _rendered("refresh.js")
    values |= {"script": Markup(script)}  # noqa: S704 - a file of this package
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return Page(html_of(template, OWN, **values), policy)


def html_of(template: str, package: str = OWN, **values: object) -> str:
    """A rendered template of a package, with the style that all pages share."""
    style = Markup(_rendered("style.css"))  # noqa: S704 - a file of this package
    return _environment(package).get_template(template).render(values, style=style)


@cache
def _rendered(file: str) -> str:
    return _environment(OWN).get_template(file).render(shades=SHADES)


def _hash(text: str) -> str:
    """The name of an allowed inline text in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(OWN)]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_encodable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["urlencode"] = lambda text: do_urlencode(encodable(text))
    return environment


def _encodable(value: object) -> object:
    """A value of a page; UTF-8 cannot encode lone surrogates, which names and paths may hold."""
    return type(value)(encodable(value)) if isinstance(value, str) else value
