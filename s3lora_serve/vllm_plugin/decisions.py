"""What an API server remembers of its latest decisions, whether or not the adapters are served."""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime

from s3lora_serve.errors import Reason
from s3lora_serve.verdict import Decision, Verdict, refused
from s3lora_serve.vllm_plugin.desk import remember


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision, without what it says of each module."""

    name: str
    decision: Decision
    refused: bool
    reason: Reason | None
    seconds: float
    time: datetime

    @classmethod
    def of(cls, verdict: Verdict) -> "Decided":
        """A decision of now."""
        return cls(
            verdict.name,
            verdict.decision,
            refused(verdict),
            verdict.reason,
            verdict.seconds.total,
            datetime.now(UTC),
        )


class Decisions:
    """The last decision on each adapter's name."""

    def __init__(self) -> None:
        self._latest: OrderedDict[str, Decided] = OrderedDict()

    def add(self, verdict: Verdict) -> None:
        """An adapter was decided on."""
        remember(self._latest, verdict.name, Decided.of(verdict))

    def last(self, name: str) -> Decided | None:
        """The last decision on the adapter of this name."""
        return self._latest.get(name)

    def refusals(self) -> list[Decided]:
        """The adapters whose last registration was refused, latest first."""
        return [decided for decided in reversed(self._latest.values()) if decided.refused]
