"""Whose adapter is calibrated next: tenants take turns by the time that theirs took."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from s3lora_serve.lab.planner.fleet import Served


@dataclass(frozen=True, slots=True)
class Waiting:
    """An adapter without a plan, and where it is served."""

    digest: str
    served: tuple[Served, ...]
    since: float  # seconds since 1970
    is_at_work: bool  # whether requests for it are under way
    is_due: bool  # whether a calibration may begin

    @property
    def tenant(self) -> str:
        """The tenant of its first name."""
        return self.served[0].tenant


class Turns:
    """The seconds of calibrations that each tenant has had."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)

    def spend(self, tenant: str, seconds: float) -> None:
        """Count a calibration of a tenant's adapter."""
        self._spent[tenant] += seconds

    def ordered(self, todo: Iterable[Waiting], running: Iterable[Waiting]) -> list[Waiting]:
        """The tenant that had least time comes first, then traffic, then the longest wait.

        What is running counts as if it took the mean time of all tenants.
        """
        mean = max(1.0, sum(self._spent.values()) / max(1, len(self._spent)))
        spent = dict(self._spent)
        for each in running:
            spent[each.tenant] = spent.get(each.tenant, 0.0) + mean

        def order(waiting: Waiting) -> tuple[float, bool, float]:
            return spent.get(waiting.tenant, 0.0), not waiting.is_at_work, waiting.since

        return sorted(todo, key=order)
