"""The figures of `make bench-scan`, as a section of RESULTS.md."""


def sweep(data: dict) -> str:  # type: ignore[type-arg]
    """The section of `make bench-scan`."""
    machine, large, small = data["machine"], data["large"], data["small"]
    seconds, size, begun = large["seconds"], large["bytes"], "scan, once begun"
    lines = [
        "## Scanning many",
        "",
        f"`make bench-scan`, {machine['processor']}, {machine['cores']} cores, {data['jobs']}"
        f" processes. {large['adapters']} adapters shaped for {data['model']}, rank"
        f" {data['rank']}, {size / large['adapters'] / 1e6:.0f} MB each; `s3lora scan --format"
        " jsonl` beside `cat` of the same files, least of three. *Once begun* is the pace from the"
        " first verdict to the last, without the start of the program.",
        "",
        "| | `cat`, MB/s | `scan`, MB/s | over `cat` | once begun, MB/s | adapters/s |"
        " over `cat` |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {label} | {size / seconds['cat' + state] / 1e6:.0f}"
            f" | {size / seconds['scan' + state] / 1e6:.0f}"
            f" | {seconds['cat' + state] / seconds['scan' + state]:.2f}"
            f" | {size / seconds[begun + state] / 1e6:.0f}"
            f" | {large['adapters'] / seconds[begun + state]:.1f}"
            f" | {seconds['cat' + state] / seconds[begun + state]:.2f} |"
            for label, state in (("from the disk", ""), ("from memory", ", cached"))
        ),
        "",
        "Small adapters (four modules of 64 × 64, rank 8):",
        "",
        "| adapters | seconds | ms for each | largest process, MB |",
        "|---:|---:|---:|---:|",
        *(
            f"| {count} | {found['seconds']:.1f} | {1000 * found['seconds'] / int(count):.2f}"
            f" | {found['megabytes']:.0f} |"
            for count, found in small.items()
        ),
    ]
    return "\n".join([*lines, ""])
