"""The two plots of RESULTS.md."""

from pathlib import Path
from typing import Any

from tests.runs.evidence.order_tables import at_equal_skill
from tests.runs.evidence.tables import read


def write_plots(folder: Path) -> None:
    """Draw those whose stages have run."""
    import matplotlib as mpl

    mpl.use("Agg")
    if found := at_equal_skill():
        _draw_equal_skill(found, folder / "equal-skill.png")
    if attributions := read("attribution-*.json"):
        _draw_attributions(attributions, folder / "index-attribution.png")


def _draw_equal_skill(found: dict[str, list[tuple[str, Any]]], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    for adapter, ways in found.items():
        names = [way for way, _ in ways]
        rates = [one["ASR"]["value"] for _, one in ways]
        axes.plot(rates, names, "o", alpha=0.6, markersize=8, label=adapter)
    axes.set(xlabel="attack success rate, at least 0.9 of the skill kept", xlim=(-0.03, 1.03))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
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
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)
