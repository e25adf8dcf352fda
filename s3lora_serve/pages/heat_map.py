"""An adapter's modules by layer and projection, and how sharp each is beside the others."""

from dataclasses import dataclass

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict

SHADES = 10
"""Steps of colour: eyes tell no more apart in a table."""

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections in the order in which a transformer layer applies them; others follow by name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The modules of one layer and projection: one, or one for each expert."""

    modules: tuple[ModuleVerdict, ...]
    ssi: float | None  # the largest; None where none has one
    stripped: int  # how many of them
    shade: int | None  # 0 for the adapter's least index to SHADES for its largest

    @property
    def sharpest(self) -> ModuleVerdict:
        """The module with the largest index."""
        return max(self.modules, key=lambda module: (module.stripped, module.ssi or 0.0))


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Rows by layer, columns by projection; None where the adapter has no module."""

    projections: tuple[str, ...]
    rows: tuple[tuple[int | None, tuple[Cell | None, ...]], ...]


def heat_map(verdict: Verdict) -> HeatMap:
    """The heat map of one adapter."""
    groups: dict[tuple[int | None, str], list[ModuleVerdict]] = {}
    for module in verdict.modules:
        groups.setdefault((module.layer, module.projection), []).append(module)
    indices = [module.ssi for module in verdict.modules if module.ssi is not None]
    low, high = (min(indices), max(indices)) if indices else (0.0, 0.0)
    projections = tuple(sorted({projection for _, projection in groups}, key=_order))
    layers = sorted({layer for layer, _ in groups}, key=lambda n: -1 if n is None else n)
    rows = tuple(
        (layer, tuple(_cell(groups.get((layer, name)), low, high) for name in projections))
        for layer in layers
    )
    return HeatMap(projections, rows)


def _order(projection: str) -> tuple[int, str]:
    known = USUAL.index(projection) if projection in USUAL else len(USUAL)
    return known, projection


def _cell(modules: list[ModuleVerdict] | None, low: float, high: float) -> Cell | None:
    if modules is None:
        return None
    ssi = max((module.ssi for module in modules if module.ssi is not None), default=None)
    shade = None
    if ssi is not None:
        shade = round(SHADES * (ssi - low) / (high - low)) if high > low else 0
    return Cell(tuple(modules), ssi, sum(module.stripped for module in modules), shade)
