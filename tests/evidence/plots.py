"""The two plots of RESULTS.md."""

from pathlib import Path
from typing import Any

from tests.evidence.order_tables import curves
from tests.evidence.tables import read


def write_plots(folder: Path) -> None:
    """Draw those whose stages have run."""
    import matplotlib as mpl

    mpl.use("Agg")
    if found := curves():
        _draw_orders(found, folder / "asr-skill.png")
    if attributions := read("attribution-*.json"):
        _draw_attributions(attributions, folder / "index-attribution.png")


def _draw_orders(found: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    groups: dict[str, list[Any]] = {}
    for by_order in found.values():
        for order, points in by_order.items():
            groups.setdefault(order.rstrip("0123456789-"), []).extend(points)
    for order, points in sorted(groups.items()):
        xs, ys = ([point[name]["value"] for point in points] for name in ("ASR", "skill"))
        axes.plot(xs, ys, "o", alpha=0.6, markersize=5, label=order)
    after = [one["after"] for one in read("20pct-b*.json").values()]
    xs, ys = ([one[name]["value"] for one in after] for name in ("ASR", "skill"))
    axes.plot(xs, ys, "*", markersize=13, color="black", label="calibrated plan")
    axes.set(xlabel="attack success rate", ylabel="skill (exact match)", xlim=(-0.03, 1.03))
    axes.legend(fontsize=7)
    _save(figure, file)


def _draw_attributions(found: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for stem, one in found.items():
        modules = one["modules"]
        xs, ys = ([module[key] for module in modules] for key in ("ssi", "harm"))
        axes.plot(xs, ys, "o", alpha=0.5, markersize=4, label=stem.removeprefix("attribution-"))
    axes.set(xlabel="relative SSI", ylabel="attribution of harm (log-odds)")
    axes.legend(fontsize=7)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})
    figure.clear()
