"""Heat map of an adapter's index: modules by layer and projection, shaded by sharpness."""

from dataclasses import dataclass

from s3lora_serve.admission.verdict import ModuleVerdict, Verdict

SHADES = 10
"""Number of colour steps. Readers cannot distinguish more in a table."""

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections in the order of a transformer layer. Other projections follow, sorted by name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The modules of one layer and projection: one, or one for each expert."""

    modules: tuple[ModuleVerdict, ...]
    ssi: float | None  # the largest index; None if no module has one
    stripped: int  # number of stripped modules
    transformed: int  # number of modules that are served changed, but not stripped
    shade: int | None  # from 0 for the adapter's smallest index to SHADES for its largest

    @property
    def sharpest(self) -> ModuleVerdict:
        """The module with the largest index; a stripped module precedes all others."""
        return max(self.modules, key=lambda module: (module.stripped, module.ssi or 0.0))


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Rows by layer, columns by projection. A cell is None if the adapter has no such module."""

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
    stripped = sum(module.stripped for module in modules)
    transformed = sum(module.changed and not module.stripped for module in modules)
    return Cell(tuple(modules), ssi, stripped, transformed, shade)
