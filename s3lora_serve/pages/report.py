"""One self-contained page on an adapter, or on two: for people who decide before it is served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict
from s3lora_serve.pages.heat_map import HeatMap, heat_map
from s3lora_serve.pages.html import html_of

SPECTRA = 40
"""Spectra shown of one adapter, of stripped and sharpest modules: more than are read."""

MAX_LISTED = 20
"""Modules listed of those on which two adapters, or two indices, disagree most."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One adapter of a report, under the policy and with other numbers of stripped modules."""

    verdict: Verdict
    by_count: Mapping[int, Verdict]  # what top_k of so many would decide
    by_scorer: Mapping[str, Verdict]  # other indices than the policy's


@dataclass(frozen=True, slots=True)
class Part:
    """What the template shows of a subject."""

    subject: Subject
    prefix: str  # of ids on the page
    map: HeatMap
    shown: tuple[ModuleVerdict, ...]
    rankings: tuple["Ranking", ...]

    def anchor(self, module: ModuleVerdict) -> str:
        """The id of a module's spectrum."""
        return f"{self.prefix}m{self.subject.verdict.modules.index(module)}"

    def link(self, module: ModuleVerdict) -> str:
        """To a module's spectrum, or to those that are shown."""
        return f"#{self.anchor(module) if module in self.shown else self.prefix + 'spectra'}"


@dataclass(frozen=True, slots=True)
class Ranking:
    """Another index beside the policy's: how alike they rank, and where they differ most."""

    scorer: str
    correlation: float | None  # Spearman's ρ
    apart: tuple[tuple[str, int, int], ...]  # module, its place by the policy's index and by this


@dataclass(frozen=True, slots=True)
class Difference:
    """One module of two adapters."""

    name: str
    first: float | None
    second: float | None

    @property
    def size(self) -> float:
        """How far apart the indices are; a module that one lacks is farther than any."""
        if self.first is None or self.second is None:
            return 2.0
        return abs(self.first - self.second)


def report(subjects: Sequence[Subject]) -> str:
    """The page as HTML that needs nothing else: no file, no network, no script."""
    parts = [_part(subject, "ab"[i]) for i, subject in enumerate(subjects)]
    return html_of("report.html", parts=parts, differences=_differences(subjects))


def _part(subject: Subject, prefix: str) -> Part:
    modules = subject.verdict.modules
    sharp = sorted(modules, key=lambda m: (not m.stripped, -(m.relative_ssi or 0.0), m.name))
    rankings = tuple(
        _ranking(name, subject.verdict, other) for name, other in subject.by_scorer.items()
    )
    return Part(subject, prefix, heat_map(subject.verdict), tuple(sharp[:SPECTRA]), rankings)


def _places(verdict: Verdict) -> dict[str, int]:
    """Each ranked module's place, 1 for the sharpest."""
    ranked = [m for m in verdict.modules if m.relative_ssi is not None]
    ranked.sort(key=lambda m: (-(m.relative_ssi or 0.0), m.name))
    return {module.name: place for place, module in enumerate(ranked, 1)}


def _ranking(scorer: str, ours: Verdict, theirs: Verdict) -> Ranking:
    first, second = _places(ours), _places(theirs)
    both = first.keys() & second.keys()
    apart = sorted(both, key=lambda name: (-abs(first[name] - second[name]), name))
    return Ranking(
        scorer,
        _spearman([(first[name], second[name]) for name in both]),
        tuple((name, first[name], second[name]) for name in apart[:MAX_LISTED]),
    )


def _spearman(places: Sequence[tuple[int, int]]) -> float | None:
    """`1 − 6·Σd² / (n·(n² − 1))`, for ranks without ties.

    >>> _spearman([(1, 1), (2, 2), (3, 3)]), _spearman([(1, 3), (2, 2), (3, 1)])
    (1.0, -1.0)
    """
    n = len(places)
    if n < 2:
        return None
    return 1 - 6 * sum((a - b) ** 2 for a, b in places) / (n * (n * n - 1))


def _differences(subjects: Sequence[Subject]) -> list[Difference]:
    if len(subjects) < 2:
        return []
    first, second = ({m.name: m.ssi for m in one.verdict.modules} for one in subjects)
    found = [
        Difference(name, first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
    ]
    return sorted(found, key=lambda one: -one.size)[:MAX_LISTED]
