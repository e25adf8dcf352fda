"""The section of RESULTS.md on alignment scorers."""

from typing import Any


def alignment(data: dict[str, Any]) -> str:
    """Scorers beside MAS-SVD, and the making of a reference."""
    machine, made = data["machine"], data["made"]
    rows = "\n".join(_row(case) for case in data["cases"])
    columns = (
        "adapter", "r", "modules", "MAS-SVD, s", "floor, s", "safe-lora, s", "over MAS-SVD",
        "splora, s", "over MAS-SVD", "error of safe-lora", "error of splora",
    )  # fmt: skip
    over = made["peak_extra_bytes"] / made["largest_module_bytes"]
    sizes = {
        name: made[f"{name}_bytes"] / 2**20 for name in ("peak_extra", "largest_module", "file")
    }
    return f"""\
## Alignment scorers

`make bench-alignment`, {machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}.
k = {data["k"]}, directions and adapter in bfloat16, all projections. *Over MAS-SVD*: the scorer
alone over MAS-SVD alone; an admission computes both. *Floor*: UᵀB and one Gram pass over A in
float32. Errors are against the dense float64 references, on twelve modules of the fewest rows.

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{rows}

A reference of a pair of checkpoints shaped for {made["model"]} ({made["modules"]} modules) took
{made["seconds"]:.0f} s, or {made["seconds"] / made["modules"]:.2f} s a module, with the digests of
both. Peak memory was {sizes["peak_extra"]:.0f} MB over the start's: {over:.1f} times the largest
module in float32, which has {sizes["largest_module"]:.0f} MB. Mapped pages of the checkpoints
count. The file has {sizes["file"]:.0f} MB.
"""


def _row(case: dict[str, Any]) -> str:
    seconds, errors = case["seconds"], case["errors"]
    base = seconds["mas-svd"]
    cells = [case["model"], str(case["rank"]), str(case["modules"]), f"{base:.3f}"]
    cells.append(f"{seconds['floor']:.3f}")
    for name in ("safe-lora", "splora"):
        cells += [f"{seconds[name]:.3f}", f"{seconds[name] / base:.2f}"]
    cells += [f"{errors[name]:.1e}" for name in ("safe-lora", "splora")]
    return f"| {' | '.join(cells)} |"
