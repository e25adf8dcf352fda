"""The settings that a sweep compares: strip counts by one scorer, and plans."""

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
    counts: Sequence[int], scorer: str | None, action: str | None, plan: dict[str, Any] | None
) -> list[Trial]:
    """A trial for each strip count, and one for the plan.

    Raises:
        ValueError: a count is negative or given twice, or there is nothing to compare.
    """
    if not counts and plan is None:
        raise ValueError("there is no setting to evaluate: give --tau or --plan")
    if min(counts, default=0) < 0 or len(set(counts)) < len(counts):
        raise ValueError(f"--tau takes different counts of 0 or more, got {list(counts)}")
    shared: dict[str, Any] = {} if scorer is None else {"scorer": {"name": scorer}}
    if action is not None:
        shared["action"] = action
    found = [Trial(f"top_k={count}", {"strip": {"top_k": count}} | shared) for count in counts]
    return found + ([Trial("plan", {}, plan)] if plan is not None else [])
