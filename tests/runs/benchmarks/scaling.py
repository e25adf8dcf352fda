"""Measure and draw how the time grows with the rank, the width and the number of modules."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from s3lora_serve.spectral import Factors
from tests.runs.benchmarks import routes, shapes
from tests.runs.benchmarks.measure import least_seconds

ROUTES = (routes.ours, routes.floor, routes.naive_batched_float64, routes.qr)
LABELS = {
    "ours": "s3lora-serve",
    "floor": "floor: two float32 Gram passes",
    "naive_batched_float64": "naive batched float64",
    "qr": "QR in float64",
}
AXES: dict[str, tuple[str, Sequence[int]]] = {
    "rank": ("rank r (8 modules of 4096 × 4096)", (4, 8, 16, 32, 64, 128, 256)),
    "width": ("width m = n (8 modules, r = 16)", (256, 512, 1024, 2048, 4096, 8192, 16384)),
    "modules": ("modules (2048 × 2048, r = 16)", (4, 16, 64, 256, 1024)),
}


def curves(rounds: int) -> dict[str, list[dict[str, object]]]:
    """Least seconds of each route along each axis."""
    found: dict[str, list[dict[str, object]]] = {}
    for axis, (_, values) in AXES.items():
        found[axis] = [
            {"at": value, "seconds": least_seconds(_modules(axis, value), ROUTES, rounds)}
            for value in values
        ]
    return found


def draw(data: dict[str, list[dict]], target: Path) -> None:  # type: ignore[type-arg]
    """One panel for each axis, both scales logarithmic, as SVG."""
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 4), layout="constrained")
    for panel, (axis, points) in zip(panels, data.items(), strict=True):
        for route, label in LABELS.items():
            style = {"linestyle": "--", "color": "grey"} if route == "floor" else {"marker": "."}
            seconds = [point["seconds"][route] for point in points]
            panel.loglog([point["at"] for point in points], seconds, label=label, **style)
        panel.set_xlabel(AXES[axis][0])
        panel.grid(visible=True, which="major", alpha=0.3)
        panel.set_xticks([point["at"] for point in points], [str(p["at"]) for p in points])
        panel.minorticks_off()
    panels[0].set_ylabel("seconds (least of the rounds)")
    panels[0].legend(fontsize="small")
    # Equal figures give an equal file: no date, and constant ids.
    pyplot.rcParams["svg.hashsalt"] = "s3lora"
    figure.savefig(target, metadata={"Date": None})
    # matplotlib ends lines of its path data with blanks.
    target.write_text("\n".join(line.rstrip() for line in target.read_text().splitlines()) + "\n")


def _modules(axis: str, value: int) -> list[Factors]:
    return {
        "rank": lambda: shapes.square(4096, value, 8),
        "width": lambda: shapes.square(value, 16, 8),
        "modules": lambda: shapes.square(2048, 16, value),
    }[axis]()
