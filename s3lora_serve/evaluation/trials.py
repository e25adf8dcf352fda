"""The settings that a sweep compares: strip counts by one scorer, residuals of repair, plans."""

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
    residuals: Sequence[float] = (),
) -> list[Trial]:
    """A trial for each strip count, for each residual of a repair, and one for the plan.

    Raises:
        ValueError: a number is out of its range or given twice, or there is nothing to compare.
    """
    if not counts and not residuals and plan is None:
        raise ValueError("there is no setting to evaluate: give --tau, --residual or --plan")
    if not all(0 < each < 1 for each in residuals) or len(set(residuals)) < len(residuals):
        raise ValueError(
            f"--residual takes different numbers between 0 and 1, got {list(residuals)}"
        )
    if min(counts, default=0) < 0 or len(set(counts)) < len(counts):
        raise ValueError(f"--tau takes different counts of 0 or more, got {list(counts)}")
    shared: dict[str, Any] = {} if scorer is None else {"scorer": {"name": scorer}}
    if action is not None:
        shared["action"] = action
    found = [Trial(f"top_k={count}", {"strip": {"top_k": count}} | shared) for count in counts]
    repaired = {"strip": {"top_k": 0}} | ({} if scorer is None else {"scorer": {"name": scorer}})
    found += [
        Trial(f"residual={each:g}", repaired | {"repair": {"residual": each}}) for each in residuals
    ]
    return found + ([Trial("plan", {}, plan)] if plan is not None else [])
