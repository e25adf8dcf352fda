"""The frontier of a calibration as a self-contained page: attack success rate against skill."""

from collections.abc import Sequence
from typing import Protocol

from s3lora_serve.pages.html import html_of
from s3lora_serve.plans.schema import Measured, Plan


class FrontierPoint(Protocol):
    """One measured strength of the gates."""

    @property
    def strength(self) -> float: ...
    @property
    def removed_share(self) -> float: ...
    @property
    def measured(self) -> Measured: ...


def frontier_page(
    plan: Plan, frontier: Sequence[FrontierPoint], by_module: Sequence[FrontierPoint]
) -> str:
    """The page as HTML without scripts. It loads no other file and needs no network."""
    named = ("gates", frontier), ("whole modules", by_module)
    actions = [module.action for module in plan.modules]
    return html_of(
        "frontier.html",
        __package__,
        plan=plan,
        series=[(name, points) for name, points in named if points],
        counts={action: actions.count(action) for action in ("keep", "transform", "strip")},
    )
