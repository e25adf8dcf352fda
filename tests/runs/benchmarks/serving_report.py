"""The figures of the benchmarks on real servers, as sections of RESULTS.md."""

import math
import statistics

LABELS = {
    "read": "copy, hash, check (API server)",
    "score": "score (API server)",
    "strip": "verify, load, compare, strip (worker)",
}


def admission(data: dict) -> str:  # type: ignore[type-arg]
    """The section of `make bench-admission`."""
    machine, loads, tokens = data["machine"], data["loads"], data["tokens"]
    phases = loads["phases"]
    lines = [
        "## Cost of an admission",
        "",
        f"`make bench-admission`, {machine['processor']}, {machine['cores']} cores. Two real vLLM"
        f" servers (CPU build, eager, float32) of a {data['model']}-shaped model with random"
        f" weights take turns; adapters of rank {data['rank']} on all projections,"
        f" {data['megabytes']:.0f} MB in bfloat16, each of other content. Medians.",
        "",
        "| `POST /v1/load_lora_adapter` | stock | guarded | guarded over stock |",
        "|---|---:|---:|---:|",
        f"| seconds | {loads['seconds']['stock']:.3f} | {loads['seconds']['guarded']:.3f} |"
        f" {loads['ratio']:.2f} |",
        "",
        "| of the guarded one | mean, s |",
        "|---|---:|",
        *(f"| {label} | {phases[phase]:.3f} |" for phase, label in LABELS.items()),
        "",
        "Time between tokens of a request to the base model:",
        "",
        "| | p50, s: stock | guarded | p99, s: stock | guarded | p99, guarded over stock |",
        "|---|---:|---:|---:|---:|---:|",
        _tokens("while adapters are loaded", tokens, ""),
        _tokens("while none is", tokens, ", no loads"),
    ]
    return "\n".join([*lines, ""])


def signing(data: dict) -> str:  # type: ignore[type-arg]
    """The section of `make bench-signing`."""
    machine, seconds, reads = data["machine"], data["seconds"], data["read"]
    ratios = {kind: _median(found) for kind, found in data["ratios"].items()}
    labels = {
        "unchecked": "neither",
        "checked": "signature and attestation verified, scored by the gate",
        "trusted": "both verified, attested scores taken",
    }
    return "\n".join(
        [
            "## Cost of signatures and attestations",
            "",
            f"`make bench-signing`, {machine['processor']}, {machine['cores']} cores. One guarded"
            f" vLLM server (CPU build, eager, float32) of a {data['model']}-shaped model with"
            f" random weights; {data['loads']} adapters of rank {data['rank']} on all"
            f" projections, {data['megabytes']:.0f} MB in bfloat16, each loaded in three ways in"
            " turns; memory is used and freed before each load. Medians; the ratio is that of what"
            " was loaded from one folder, with the interval in which its median lies with 95 %"
            " confidence (order statistics).",
            "",
            "| `POST /v1/load_lora_adapter` | seconds | of it copy, hash, verify | over neither |",
            "|---|---:|---:|---:|",
            *(
                f"| {label} | {seconds[k]:.3f} | {reads[k]:.3f} | {ratios.get(k, '1')} |"
                for k, label in labels.items()
            ),
            "",
        ]
    )


def _tokens(label: str, tokens: dict, suffix: str) -> str:  # type: ignore[type-arg]
    stock, guarded = tokens[f"stock{suffix}"], tokens[f"guarded{suffix}"]
    figures = [side[p] for p in ("p50", "p99") for side in (stock, guarded)]
    ratio = guarded["p99"] / stock["p99"]
    return f"| {label} | " + " | ".join(f"{x:.3f}" for x in figures) + f" | {ratio:.2f} |"


SERVED = {
    "base": "base model",
    "whole": "adapter, whole",
    "ten": "10 of 28 modules stripped",
    "half": "14 of 28 stripped",
    "all": "28 of 28 stripped",
}


def inference(data: dict) -> str:  # type: ignore[type-arg]
    """The section of `make bench-serving`."""
    machine, model, tokens = data["machine"], data["model"], data["tokens"]
    lines = [
        "## Cost at inference",
        "",
        f"`make bench-serving`, {machine['processor']}, {machine['cores']} cores. Real vLLM (CPU"
        f" build, eager, float32), a Llama of {model['layers']} layers, width {model['width']} and"
        f" random weights, an adapter of rank {model['rank']} on all 28 modules. Prefill: prompts"
        f" of {tokens['prompt']} tokens; decode: {tokens['new']} tokens a request. Seconds for the"
        f" whole batch, least of {data['rounds']} rounds; ratios are medians over the rounds of"
        " what stood beside each other in one.",
        "",
        "One engine under the gate, which computes what has no weights and skips it in turns:",
        "",
    ]
    for case, seconds in data["seconds"].items():
        phase, batch = case.split(", ")
        lines += [
            f"| {phase}, batch {batch} | computed | skipped | skipped over its whole |"
            " over its base | over computed |",
            "|---|---:|---:|---:|---:|---:|",
            *(_served(label, name, seconds) for name, label in SERVED.items()),
            "",
        ]
    lines += [
        f"What should cost nothing, in the same engine: {_times(data['pairs'])} times one, two,"
        " two, one, after each was asked once; the median of the ratios, and where it lies with"
        " 95 % confidence (order statistics).",
        "",
        *_medians(data["pairs"]),
        "",
        f"Two servers, nothing being loaded, started {data['starts']} times and asked in the same"
        f" way {_times(data['servers'])} times in all: what the gate serves at of stock vLLM's"
        " throughput.",
        "",
        *_medians(data["servers"]),
    ]
    return "\n".join([*lines, ""])


def _times(found: dict[str, dict[str, list[float]]]) -> int:
    return len(next(iter(next(iter(found.values())).values())))


def _medians(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """A table of median ratios by phase and batch, and over all of them."""
    names = list(next(iter(found.values())))
    every = {name: [one for row in found.values() for one in row[name]] for name in names}
    rows = [(", batch ".join(case.split(", ")), row) for case, row in found.items()]
    return [
        "| | " + " | ".join(SERVED.get(name, name) for name in names) + " |",
        "|---|" + "---:|" * len(names),
        *(
            f"| {case} | " + " | ".join(_median(row[name]) for name in names) + " |"
            for case, row in [*rows, ("all four", every)]
        ),
    ]


def _median(ratios: list[float]) -> str:
    low, high = confidence(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def _served(label: str, name: str, seconds: dict[str, list[float]]) -> str:
    ours = f"skipped, {name}"
    figures = [f"{min(seconds[f'{route}, {name}']):.3f}" for route in ("computed", "skipped")]
    others = ("skipped, whole", "skipped, base", f"computed, {name}")
    ratios = [f"{_ratio(seconds, ours, other):.2f}" for other in others]
    return f"| {label} | " + " | ".join([*figures, *ratios]) + " |"


def _ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    pairs = zip(seconds[ours], seconds[theirs], strict=True)
    return statistics.median(a / b for a, b in pairs)


def confidence(found: list[float]) -> tuple[float, float]:
    """An interval that contains the distribution's median with a confidence of at least 95 %.

    The number of samples below the median is binomial, p = 1/2.
    """
    n, below, place = len(found), 0.0, 0
    while (below := below + math.comb(n, place) / 2**n) <= 0.025:
        place += 1
    values = sorted(found)
    return values[max(0, place - 1)], values[min(n - 1, n - place)]
