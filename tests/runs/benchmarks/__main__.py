"""`make bench`: score adapters of several shapes by several routes, and write RESULTS.md."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track

from s3lora_serve.spectral import Factors
from tests.runs.benchmarks import measure, report, routes, scaling, shapes

HERE = Path(__file__).parent
FAST = (routes.ours, routes.floor, routes.naive_batched_float64, routes.per_module_float32)
LAYER = 7  # projections
LARGE = 2**28  # parameters; above this a round takes seconds, so only two rounds run


@dataclass(frozen=True)
class Case:
    """One adapter to score."""

    model: str
    rank: int = 16
    dtype: str = "bfloat16"
    projections: str = "all"
    decades: float = 0.0  # over which the norms of the columns of each B decrease

    def modules(self) -> list[Factors]:
        """Gaussian factors of this shape."""
        chosen = shapes.ATTENTION if self.projections == "attention" else None
        dtype = getattr(torch, self.dtype)
        return shapes.adapter(self.model, self.rank, dtype, chosen, self.decades)


CASES = [
    *(Case(model, projections=p) for model in shapes.MODELS for p in ("attention", "all")),
    *(Case("Llama-3-8B", rank) for rank in (8, 32, 64, 128, 256)),
    Case("Llama-3-8B", dtype="float16"),
    Case("Llama-3-8B", dtype="float32"),
    Case("Llama-3-8B", decades=2.0),
    Case("Llama-3-70B", 64),
]


def main() -> None:
    """Run the cases, print the table, write the data, the curves and RESULTS.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9, help="each figure is the least of these")
    parser.add_argument(
        "--cases", type=int, nargs="+", metavar="ROW",
        help="measure only these rows of the table (from 0) and keep the others",
    )  # fmt: skip
    parser.add_argument("--memory", type=int, metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory is not None:
        print(measure.peak_extra(CASES[arguments.memory].modules()))
        return
    found = {
        i: _measured(i, CASES[i], arguments.rounds)
        for i in track(arguments.cases or range(len(CASES)), "cases", transient=True)
    }
    if arguments.cases:
        data = json.loads((HERE / "results.json").read_text())
        if data["machine"] != measure.machine():
            parser.error("results.json is of another machine: measure all rows")
        data["cases"] = [found.get(i, case) for i, case in enumerate(data["cases"])]
    else:
        curves = scaling.curves(max(2, arguments.rounds // 3))
        data = {"machine": measure.machine(), "cases": list(found.values()), "scaling": curves}
    (HERE / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)
    scaling.draw(data["scaling"], HERE / "scaling.svg")
    report.show(data["cases"])


def _measured(i: int, case: Case, rounds: int) -> dict[str, object]:
    extra = measure.in_fresh_process(str(i))
    modules = case.modules()
    parameters = sum(m.A.numel() + m.B.numel() for m in modules)
    seconds = measure.least_seconds(modules, FAST, 2 if parameters > LARGE else rounds)
    layer, two = modules[:LAYER], modules[: 2 * LAYER]
    small = sorted(modules, key=lambda m: m.B.shape[0] * m.A.shape[1])[:2]
    slow = measure.least_seconds(small, (routes.ours, routes.dense), 1)
    beside = measure.least_seconds(layer, (routes.ours, routes.qr), 2)
    against_dense = measure.largest_errors(routes.dense(small), small)
    against_qr = measure.largest_errors(routes.qr(two), two)
    return {
        **asdict(case),
        "modules": len(modules),
        "parameters": parameters,
        "seconds": seconds,
        "sample_seconds": slow | {"qr": beside["qr"], "ours_beside_qr": beside["ours"]},
        "errors": {key: max(against_dense[key], against_qr[key]) for key in against_qr},
        "extra_bytes": extra,
    }


if __name__ == "__main__":
    main()
