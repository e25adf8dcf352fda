"""`python -m tests.runs.gpu.report FOLDER…`: RESULTS.md from the check.json of runs on a GPU.

Of a step that several runs have, the last counts.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Found = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown, with numbers to the right."""
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def machine(found: Found) -> list[str]:
    """Versions and bandwidths."""
    versions = ", ".join(f"{name} {is_}" for name, is_ in found["versions"].items() if is_)
    lines = [f"{found['gpu'] or 'No GPU'}, {found['cores']} cores. {versions}.", ""]
    if "host_to_device" in found:
        lines[0] += f" Pinned memory to device: {found['host_to_device'] / 1e9:.1f} GB/s."
    return lines


def device_tests(found: Found) -> list[str]:
    """How many tests passed, and which did not."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items())
    failed = [f"- failed: `{name}`" for name in found["failed"]]
    return [f"Tests of scoring on the device: {counts}.", "", *failed, *([""] if failed else [])]


def scoring(found: Found) -> list[str]:
    """The pass, beside the CPU's and its floor."""
    head = ["adapter", "r", "MB", "first, ms", "then, ms", "CPU over it", "over floor"]
    head += ["kernels, copies, waits", "modules for the CPU", "largest difference of SSI"]
    head += ["staging, ms", "of hashing"]
    rows = [
        [
            one["model"] + (", B falls a decade" if one["decades"] else ""), f"{one['rank']}",
            f"{one['bytes'] / 1e6:.0f}", _ms(one["cold"]), _ms(one["warm"]),
            f"{one['cpu'] / one['warm']:.2f}", f"{one['warm'] / one['floor']:.2f}",
            ", ".join(str(one.get(name, "–")) for name in ("kernels", "copies", "waits")),
            f"{one['to the host']} of {one['modules']}", f"{one['largest difference']:.1e}",
            _ms(one["staging"]), f"{one['staging'] / one['hashing']:.2f}",
        ]
        for one in found["cases"]
    ]  # fmt: skip
    words = "Upload included. The floor is the weights' transfer from pinned memory. *Staging*: the"
    words += " copy into it, which an upload that starts while the file is hashed would hide."
    return ["## Scoring", "", words, "", *table(head, rows)]


def repair(found: Found) -> list[str]:
    """Repair, which the CPU does, beside scoring."""
    names = ("score, CPU", "score, device", "repair")
    rows = [
        [
            one["model"], f"{one['rank']}", *(_ms(one[name]) for name in names),
        ]
        for one in found["cases"]
    ]  # fmt: skip
    return ["## Repair", "", *table(["adapter", "r", *(f"{name}, ms" for name in names)], rows)]


def layers(found: Found) -> list[str]:
    """LoRA of 128 linear layers in one graph."""
    kinds = found["milliseconds"]
    batches = sorted({batch for kind in kinds.values() for batch in kind}, key=int)
    rows = [[kind, *(_known(one.get(batch)) for batch in batches)] for kind, one in kinds.items()]
    host = found.get("host microseconds", {})
    rows = [[*row, _known(host.get(row[0]))] for row in rows]
    words = "Milliseconds of the LoRA operations of 128 linear layers of an 8B shape, r = 16, in"
    return [
        "## Skipping in a captured graph", "",
        f"{words} one CUDA graph, by batch. *Rows*: with the gate's rows of active ids.", "",
        *table(["weights", *batches, "host, µs a change of the batch"], rows),
    ]  # fmt: skip


def doors(found: Found) -> list[str]:
    """A guarded server over HTTP."""
    differences = found["largest difference from the CPU's"].items()
    rows = [[name, f"{value:.1e}"] for name, value in differences]
    lines = ["## Real vLLM over HTTP", "", *table(["log-probabilities", "from the CPU's"], rows)]
    lines += [f"- {door}: {is_}" for door, is_ in found.get("doors", {}).items()]
    return [*lines, ""]


def tokens(found: Found) -> list[str]:
    """Time per token of whole engines."""
    rows = [
        [f"{kind}, adapter: {adapter}", batch, f"{value:.3f}"]
        for kind, adapters in found["milliseconds a token"].items()
        for adapter, batches in adapters.items()
        for batch, value in batches.items()
    ]
    words = "Milliseconds a token, a model of the 1B shape. Adapters: none, whole, 30 % of the"
    head = ["engine", "batch", "ms a token"]
    return ["## Tokens", "", f"{words} modules stripped, all stripped.", "", *table(head, rows)]


def loads(found: Found) -> list[str]:
    """Registrations beside requests."""
    rows = [
        [
            kind, _known(sorted(one["load, ms"])[len(one["load, ms"]) // 2]),
            _known(max(one["load, ms"])), _known(one["p99 before"]), _known(one["p99 beside"]),
            _known(one["longest beside"]),
        ]
        for kind, one in found.items()
    ]  # fmt: skip
    head = ["server", "load, median ms", "longest", "p99 between tokens before, ms", "beside loads"]
    return ["## Registrations", "", *table([*head, "longest beside"], rows)]


SECTIONS: dict[str, Callable[[Found], list[str]]] = {
    "machine": machine, "device_tests": device_tests, "scoring": scoring, "repair": repair,
    "layers": layers,
    "doors": doors, "tokens": tokens, "loads": loads,
}  # fmt: skip


def markdown(results: dict[str, Found]) -> str:
    """All sections that have figures, and what became of the others."""
    lines = [
        "# On a GPU",
        "",
        "Written by `python -m tests.runs.gpu.report` from runs of `tests/runs/gpu/check.sh`.",
        "",
    ]
    for name, section in SECTIONS.items():
        one = results.get(name)
        if one is None or one["found"] is None:
            lines += [f"`{name}`: unmeasured.", ""]
            continue
        lines += section(one["found"])
        if one["status"] != 0:
            how = "it had no time left" if one["status"] is None else f"status {one['status']}"
            lines += [f"`{name}` is not whole: {how} after {one['seconds']} s.", ""]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main() -> None:
    """Write the file, unless the run was not on a GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="+")
    results: dict[str, Found] = {}
    for folder in parser.parse_args().folders:
        results |= json.loads((folder / "check.json").read_text())
    text = markdown(results)
    if not (results.get("machine", {}).get("found") or {}).get("gpu"):
        print(text)
        parser.exit(1, "this run was not on a GPU: tests/runs/gpu/RESULTS.md is left as it is\n")
    (HERE / "RESULTS.md").write_text(text)
    (HERE / "check.json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
