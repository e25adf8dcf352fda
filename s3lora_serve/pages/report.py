"""A self-contained HTML page on one adapter or two, for a review before they are served."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict
from s3lora_serve.pages.heat_map import HeatMap, heat_map
from s3lora_serve.pages.html import html_of

SPECTRA = 40
"""Spectra shown for one adapter: changed modules, then the sharpest. Reviewers read fewer."""

MAX_LISTED = 20
"""Number of modules listed on which two adapters, or two indices, differ most."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One adapter of a report, with its verdicts under the policy and under variants of it."""

    verdict: Verdict
    by_count: Mapping[int, Verdict]  # verdicts with top_k set to each count
    by_scorer: Mapping[str, Verdict]  # verdicts with other indices than the policy's
    by_choice: Mapping[str, Verdict] = field(default_factory=dict)  # plan, repair, index alone
    evaluated: Sequence["EvaluatedSetting"] = ()  # what an evaluation measured of the adapter


@dataclass(frozen=True, slots=True)
class EvaluatedSetting:
    """One setting of an evaluation on a server, with its mean scores."""

    label: str
    changed: int  # modules
    asr: float | None  # None: no task measured it
    utility: float | None
    is_recommended: bool


@dataclass(frozen=True, slots=True)
class Part:
    """The values of a subject that the template shows."""

    subject: Subject
    prefix: str  # of the ids on the page
    map: HeatMap
    shown: tuple[ModuleVerdict, ...]
    rankings: tuple["Ranking", ...]

    def removed(self, verdict: Verdict) -> float:
        """The share of the adapter's squared norm that a verdict takes away."""
        return sum(m.removed_share * (m.energy_share or 0.0) for m in verdict.modules)

    def anchor(self, module: ModuleVerdict) -> str:
        """The id of a module's spectrum."""
        return f"{self.prefix}m{self.subject.verdict.modules.index(module)}"

    def link(self, module: ModuleVerdict) -> str:
        """The link to a module's spectrum, or to the list of spectra if it is not shown."""
        return f"#{self.anchor(module) if module in self.shown else self.prefix + 'spectra'}"


@dataclass(frozen=True, slots=True)
class Ranking:
    """Rank correlation of another index with the policy's, and where they differ most."""

    scorer: str
    correlation: float | None  # Spearman's ρ
    apart: tuple[tuple[str, int, int], ...]  # name, position by the policy's index and by this


@dataclass(frozen=True, slots=True)
class Difference:
    """The index of one module in two adapters."""

    name: str
    first: float | None
    second: float | None

    @property
    def size(self) -> float:
        """Absolute difference of the indices, or 2.0, above any difference, if one is missing."""
        if self.first is None or self.second is None:
            return 2.0
        return abs(self.first - self.second)


def report(subjects: Sequence[Subject]) -> str:
    """The page as HTML without scripts. It loads no other file and needs no network."""
    parts = [_part(subject, "ab"[i]) for i, subject in enumerate(subjects)]
    return html_of("report.html", parts=parts, differences=_differences(subjects))


def _part(subject: Subject, prefix: str) -> Part:
    modules = subject.verdict.modules
    sharp = sorted(
        modules,
        key=lambda m: (not m.changed, -(m.strip_order or 0.0), m.name),
    )
    rankings = tuple(
        _ranking(name, subject.verdict, other) for name, other in subject.by_scorer.items()
    )
    return Part(subject, prefix, heat_map(subject.verdict), tuple(sharp[:SPECTRA]), rankings)


def _positions(verdict: Verdict) -> dict[str, int]:
    """The position of each ranked module, 1 for the one that is stripped first."""
    ranked = [m for m in verdict.modules if m.strip_order is not None]
    ranked.sort(key=lambda m: (-(m.strip_order or 0.0), m.name))
    return {module.name: position for position, module in enumerate(ranked, 1)}


def _ranking(scorer: str, ours: Verdict, theirs: Verdict) -> Ranking:
    first, second = _positions(ours), _positions(theirs)
    both = first.keys() & second.keys()
    apart = sorted(both, key=lambda name: (-abs(first[name] - second[name]), name))
    return Ranking(
        scorer,
        _spearman([_ranks_among(both, positions) for positions in (first, second)]),
        tuple((name, first[name], second[name]) for name in apart[:MAX_LISTED]),
    )


def _ranks_among(names: Collection[str], positions: Mapping[str, int]) -> dict[str, int]:
    """Ranks 1 to n of these modules among themselves; `positions` may hold more modules."""
    ordered = sorted(names, key=positions.__getitem__)
    return {name: rank for rank, name in enumerate(ordered, 1)}


def _spearman(ranks: Sequence[Mapping[str, int]]) -> float | None:
    """`1 − 6·Σd² / (n·(n² − 1))` of two rankings of the same n modules, without ties.

    >>> _spearman([{"a": 1, "b": 2, "c": 3}, {"a": 3, "b": 2, "c": 1}])
    -1.0
    """
    first, second = ranks
    n = len(first)
    if n < 2:
        return None
    return 1 - 6 * sum((first[name] - second[name]) ** 2 for name in first) / (n * (n * n - 1))


def _differences(subjects: Sequence[Subject]) -> list[Difference]:
    if len(subjects) < 2:
        return []
    first, second = ({m.name: m.ssi for m in one.verdict.modules} for one in subjects)
    found = [
        Difference(name, first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
    ]
    return sorted(found, key=lambda one: -one.size)[:MAX_LISTED]
