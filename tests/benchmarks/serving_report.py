"""The figures of the benchmarks on real servers, as sections of RESULTS.md."""

LABELS = {
    "read": "copy, hash, check (API server)",
    "score": "score (API server)",
    "strip": "verify, load, compare, strip (worker)",
}


def admission(data: dict) -> str:  # type: ignore[type-arg]
    """`make bench-admission`."""
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


def _tokens(label: str, tokens: dict, suffix: str) -> str:  # type: ignore[type-arg]
    stock, guarded = tokens[f"stock{suffix}"], tokens[f"guarded{suffix}"]
    figures = [side[p] for p in ("p50", "p99") for side in (stock, guarded)]
    ratio = guarded["p99"] / stock["p99"]
    return f"| {label} | " + " | ".join(f"{x:.3f}" for x in figures) + f" | {ratio:.2f} |"
