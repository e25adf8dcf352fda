"""Pages of a running server: the list of adapters, and one adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import urlencode

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict
from s3lora_serve.pages.heat_map import heat_map
from s3lora_serve.pages.html import Page, page_of

ROWS = 50
"""Adapters on one page: about as many as a reader looks through before filtering."""


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """One adapter in a list."""

    name: str
    decision: str
    stripped: int
    modules: int
    seconds: float  # duration of the decision
    time: datetime
    quarantined: bool = False
    code: str | None = None
    reason: str | None = None
    selected_by: str = "index"
    transformed: int = 0
    projected: int = 0
    repaired: int = 0
    suspicion: float | None = None  # None: no statistics say how it turns refusals
    experiment: bool = False
    plan: str | None = None  # how far its plan is; None: nothing plans it


class Named(Protocol):
    """One adapter that has a name."""

    @property
    def name(self) -> str:
        """The adapter's name."""


T = TypeVar("T", bound=Named)


def adapters_page(
    served: Sequence[T],
    refused: Sequence[AdapterRow],
    row: Callable[[T], AdapterRow],
    *,
    query: str,
    number: int,
    mode: str,
    policy_digest: str,
) -> Page:
    """The served and the recently refused adapters whose name contains `query`, in any case.

    `row` is called for those served adapters that the page shows.
    """
    found = [adapter for adapter in served if query.lower() in adapter.name.lower()]
    pages = max(1, -(-len(found) // ROWS))
    number = min(max(number, 1), pages)
    rows = [row(adapter) for adapter in found[(number - 1) * ROWS : number * ROWS]]
    return page_of(
        "adapters.html",
        rows=rows,
        planned=any(one.plan is not None for one in rows),
        judged=any(one.suspicion is not None for one in rows),
        refused=[one for one in refused if query.lower() in one.name.lower()][:ROWS],
        found=len(found),
        total=len(served),
        query=query,
        number=number,
        pages=pages,
        mode=mode,
        policy_digest=policy_digest,
    )


def adapter_page(verdict: Verdict, chosen: str | None, *, quarantined: bool) -> Page:
    """One adapter: heat map of the index, and spectrum of the chosen or else sharpest module."""
    modules = {module.name: module for module in verdict.modules}
    return page_of(
        "adapter.html",
        verdict=verdict,
        quarantined=quarantined,
        map=heat_map(verdict),
        link=partial(_module_link, verdict.name),
        prefix="",
        chosen=modules.get(chosen or "", _sharpest(verdict)),
    )


def _module_link(adapter: str, module: ModuleVerdict) -> str:
    asked = {"adapter": adapter, "module": module.name}
    return "/s3lora/?" + urlencode(asked, errors="backslashreplace") + "#module"


def _sharpest(verdict: Verdict) -> ModuleVerdict | None:
    return max(verdict.modules, key=lambda module: module.ssi or 0.0, default=None)
