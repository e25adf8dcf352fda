"""The tables of orders of whole modules, and of the index beside attribution."""

from typing import Any

from tests.evidence.tables import kept_result, rate, read, score, table


def curves() -> dict[str, dict[str, list[Any]]]:
    """Points by adapter and order."""
    found: dict[str, dict[str, list[Any]]] = {}
    for stem, points in read("curves/*.json").items():
        adapter, _, order = stem.partition("-s")[0], "", stem
        seed, _, order = stem.partition("-s")[2].partition("-")
        found.setdefault(f"{adapter}-s{seed}", {})[order] = points
    for stem, one in read("alignment-*.json").items():
        if one["points"]:
            found.setdefault(stem.removeprefix("alignment-"), {}).update(one["points"])
    return found


def orders() -> str:
    parts = []
    for adapter, by_order in curves().items():
        points = sorted({point["at"] for p in by_order.values() for point in p}, key=_place)
        rows = []
        for order in sorted(by_order):
            at = {point["at"]: point for point in by_order[order]}
            rows.append((order, *(_pair(at.get(name)) for name in points)))
        best = max(score(point) for p in by_order.values() for point in p)
        text = f"\n{adapter}: ASR / skill at each point; the best score of any is {best:.2f}.\n\n"
        parts.append(text + table(("order", *points), rows))
        top, ours = kept_result(f"ceiling-{adapter}"), kept_result(adapter)
        if top and ours:
            parts.append(
                f"\nGates learnt on the test prompts themselves (a ceiling): ASR"
                f" {rate(top['ASR'])}, skill {rate(top['skill'])}, score {score(top):.2f};"
                f" calibrated on probes: score {score(ours['after']):.2f}.\n"
            )
    if not parts:
        return ""
    return (
        "## Orders of whole modules\n\nOf 210 modules the first are removed in each order, at equal"
        " counts and at equal removed shares of Σ‖ΔW‖_F²; `scaling` scales all of ΔW, and"
        " `Safe LoRA projected` projects modules where the others remove them. 50 prompts of each"
        " kind.\n" + "".join(parts) + "\n![ASR against skill](asr-skill.png)\n"
    )


def _place(name: str) -> tuple[str, float]:
    kind, _, number = name.partition(" ")
    return kind, float(number)


def _pair(point: Any) -> str:
    return f"{point['ASR']['value']:.2f} / {point['skill']['value']:.2f}" if point else ""


def attribution() -> str:
    found = read("attribution-*.json")
    if not found:
        return ""
    by_alignment = read("alignment-*.json")
    for stem, one in found.items():
        other = by_alignment.get(f"alignment-{stem.removeprefix('attribution-')}", {})
        one["correlations"] |= other.get("correlations", {})
    names = list(next(iter(found.values()))["correlations"])
    rows = [
        (
            stem.removeprefix("attribution-"),
            *(f"{one['correlations'].get(name, float('nan')):+.2f}" for name in names),
        )
        for stem, one in found.items()
    ]
    return (
        "## Index against attribution of harm\n\nSpearman's rank correlation with integrated"
        " gradients of the log-odds of a refusal, over modules; of Safe LoRA and SPLoRA the least"
        " aligned come first.\n\n"
        + table(("adapter", *names), rows)
        + _captured(by_alignment)
        + "\n![index against attribution](index-attribution.png)\n"
    )


def _captured(by_alignment: dict[str, Any]) -> str:
    return "".join(
        f"\nThe alignment reference of {stem.removeprefix('alignment-')}'s base, rank 128, captures"
        f" {one['captured'][0]:.0%} to {one['captured'][1]:.0%} (least and median module) of what"
        " alignment changed.\n"
        for stem, one in by_alignment.items()
    )
