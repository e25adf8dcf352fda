"""The settings that a sweep compares: strip counts by one scorer, strengths of repair, plans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting, as the server's experiments take it."""

    label: str  # ends the name of the experiment: top_k=10
    settings: dict[str, Any]
    plan: dict[str, Any] | None = None

    @property
    def snippet(self) -> dict[str, Any]:
        """The policy keys that make this setting the server's."""
        return {"plans": "DIR"} if self.plan is not None else dict(self.settings)


def trials(
    counts: Sequence[int],
    scorer: str | None,
    action: str | None,
    plan: dict[str, Any] | None,
    strengths: Sequence[float] = (),
) -> list[Trial]:
    """A trial for each strip count, for each λ of a repair, and one for the plan.

    Raises:
        ValueError: a number is out of its range or given twice, or there is nothing to compare.
    """
    if not counts and not strengths and plan is None:
        raise ValueError("there is no setting to evaluate: give --tau, --strength or --plan")
    if not all(0 < each <= 1e6 for each in strengths) or len(set(strengths)) < len(strengths):
        raise ValueError(f"--strength takes different numbers above 0, got {list(strengths)}")
    if min(counts, default=0) < 0 or len(set(counts)) < len(counts):
        raise ValueError(f"--tau takes different counts of 0 or more, got {list(counts)}")
    shared: dict[str, Any] = {} if scorer is None else {"scorer": {"name": scorer}}
    if action is not None:
        shared["action"] = action
    found = [Trial(f"top_k={count}", {"strip": {"top_k": count}} | shared) for count in counts]
    repaired = {"strip": {"top_k": 0}} | ({} if scorer is None else {"scorer": {"name": scorer}})
    found += [
        Trial(f"strength={each:g}", repaired | {"repair": {"strength": each}}) for each in strengths
    ]
    return found + ([Trial("plan", {}, plan)] if plan is not None else [])
