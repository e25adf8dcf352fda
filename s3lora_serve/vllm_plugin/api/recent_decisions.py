"""The latest decision on each adapter name, whether or not the adapter is served."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime

from s3lora_serve.admission.verdict import Decision, Verdict, is_refused
from s3lora_serve.errors import Reason
from s3lora_serve.vllm_plugin.bounded_map import remember


@dataclass(frozen=True, slots=True)
class RecentDecision:
    """One decision, without its modules."""

    name: str
    decision: Decision
    refused: bool
    reason: Reason | None
    seconds: float
    time: datetime

    @classmethod
    def of(cls, verdict: Verdict) -> "RecentDecision":
        """A decision made now."""
        return cls(
            verdict.name,
            verdict.decision,
            is_refused(verdict),
            verdict.reason,
            verdict.seconds.total,
            datetime.now(UTC),
        )


class RecentDecisions:
    """The last decision on each adapter name."""

    def __init__(self) -> None:
        self._latest: OrderedDict[str, RecentDecision] = OrderedDict()

    def add(self, verdict: Verdict) -> None:
        """Add a decision made now."""
        remember(self._latest, verdict.name, RecentDecision.of(verdict))

    def last(self, name: str) -> RecentDecision | None:
        """The last decision on the adapter of this name."""
        return self._latest.get(name)

    def refusals(self) -> list[RecentDecision]:
        """Adapters whose last registration was refused, latest first."""
        return [decision for decision in reversed(self._latest.values()) if decision.refused]
