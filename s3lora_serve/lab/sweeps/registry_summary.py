"""Summarize the verdicts on a whole registry: distribution, outliers, tenants."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from s3lora_serve.adapter.remote_storage import is_url
from s3lora_serve.admission.strip_rules import MAD_TO_SIGMA
from s3lora_serve.admission.verdict import Decision, Verdict

BINS = 50
"""Bins of the index, which lies in (0, 1]: steps of 0.02."""

OUTLYING = 3.5
"""Robust z-score above which an adapter is an outlier. Source: Iglewicz and Hoaglin (1993), How to
Detect and Handle Outliers."""


@dataclass(frozen=True, slots=True)
class RegistryRow:
    """One adapter as a row of a table."""

    path: str
    tenant: str  # first folder below the registry's root; empty for an adapter in the root
    name: str
    digest: str | None
    decision: str
    code: str | None
    modules: int
    stripped: int
    highest_ssi: float | None
    mean_ssi: float | None
    highest_relative_ssi: float | None
    uninformative: bool
    policy_digest: str
    seconds: float


COLUMNS = tuple(field.name for field in fields(RegistryRow))


@dataclass(frozen=True, slots=True)
class Tenant:
    """The adapters of one tenant."""

    name: str
    adapters: int
    stripped: int
    rejected: int
    highest_ssi: float | None


@dataclass(frozen=True, slots=True)
class Outlier:
    """An adapter whose highest relative index is far above that of most adapters."""

    row: RegistryRow
    score: float  # robust z-score


@dataclass(frozen=True, slots=True)
class RegistrySummary:
    """One row for each adapter, and the number of modules with an index in each bin."""

    rows: tuple[RegistryRow, ...]
    modules: tuple[int, ...]

    def decisions(self) -> dict[str, int]:
        """The number of adapters by decision."""
        found = Counter(row.decision for row in self.rows)
        return {decision.value: found[decision.value] for decision in Decision}

    def reasons(self) -> list[tuple[str, int]]:
        """The number of rejected adapters by code, the most common code first."""
        return Counter(row.code for row in self.rows if row.code).most_common()

    def tenants(self) -> list[Tenant]:
        """All tenants, those with the most rejected adapters first."""
        groups: dict[str, list[RegistryRow]] = {}
        for row in self.rows:
            groups.setdefault(row.tenant, []).append(row)
        found = [_tenant(name, rows) for name, rows in groups.items()]
        return sorted(found, key=lambda one: (-one.rejected, -one.stripped, one.name))

    def outliers(self) -> list[Outlier]:
        """Adapters whose highest relative index has a robust z-score above OUTLYING, highest first.

        `z = (x − median) / (1.4826 · MAD)`. No adapter is an outlier if the MAD is 0.
        """
        ranked = {row: row.highest_relative_ssi for row in self.rows}
        values = [value for value in ranked.values() if value is not None]
        if not values:
            return []
        middle = median(values)
        sigma = MAD_TO_SIGMA * median(abs(value - middle) for value in values)
        if not sigma:
            return []
        scored = [
            Outlier(row, (value - middle) / sigma)
            for row, value in ranked.items()
            if value is not None
        ]
        return sorted((o for o in scored if o.score > OUTLYING), key=lambda o: -o.score)


def summarize(lines: Iterable[str]) -> RegistrySummary:
    """Summarize the lines that `scan --format jsonl` wrote, reading one line at a time.

    Raises:
        ValueError: a line is not a verdict; the message contains its number.
    """
    rows: list[RegistryRow] = []
    bins = [0] * BINS
    for number, line in enumerate(lines, 1):
        try:
            verdict = Verdict.from_json(json.loads(line))
            indices = [module.ssi for module in verdict.modules if module.ssi is not None]
            if not all(0 <= ssi <= 1 for ssi in indices):
                raise ValueError("an index lies in [0, 1]")
            rows.append(_row(verdict, indices))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no verdict: {type(error).__name__}") from None
        for ssi in indices:
            bins[min(BINS - 1, int(ssi * BINS))] += 1
    local = [row.path for row in rows if not is_url(row.path)]
    stored = [row.path for row in rows if is_url(row.path)]
    roots = {False: _root(local), True: _root(stored)}
    complete = (_with_tenant(row, roots[is_url(row.path)]) for row in rows)
    return RegistrySummary(tuple(complete), tuple(bins))


def as_columns(rows: Sequence[RegistryRow]) -> dict[str, list[Any]]:
    """The rows as columns, for table formats."""
    return {name: [getattr(row, name) for row in rows] for name in COLUMNS}


def _row(verdict: Verdict, indices: Sequence[float]) -> RegistryRow:
    relative = [m.relative_ssi for m in verdict.modules if m.relative_ssi is not None]
    return RegistryRow(
        path=verdict.path if is_url(verdict.path) else str(Path(verdict.path).absolute()),
        tenant="",
        name=verdict.name,
        digest=verdict.digest,
        decision=verdict.decision.value,
        code=verdict.reason.code if verdict.reason else None,
        modules=len(verdict.modules),
        stripped=len(verdict.stripped),
        highest_ssi=max(indices, default=None),
        mean_ssi=fmean(indices) if indices else None,
        highest_relative_ssi=max(relative, default=None),
        uninformative=verdict.uninformative,
        policy_digest=verdict.policy_digest,
        seconds=verdict.seconds.total,
    )


def _root(paths: Sequence[str]) -> str:
    """The deepest folder that contains all of the paths."""
    return os.path.commonpath(paths) if paths else ""


def _with_tenant(row: RegistryRow, root: str) -> RegistryRow:
    below = Path(row.path).relative_to(root).parts[:-1]
    return replace(row, tenant=below[0] if below else "")


def _tenant(name: str, rows: Sequence[RegistryRow]) -> Tenant:
    return Tenant(
        name,
        len(rows),
        sum(row.decision == Decision.STRIPPED for row in rows),
        sum(row.decision == Decision.REJECTED for row in rows),
        max((row.highest_ssi for row in rows if row.highest_ssi is not None), default=None),
    )
