"""The tables of ways to remove harm at equal skill, and of the index beside attribution."""

from typing import Any

from tests.runs.evidence.equal_skill import LEAST_SKILL
from tests.runs.evidence.tables import kept_result, rate, read, score, table


def at_equal_skill() -> dict[str, list[tuple[str, Any]]]:
    """For each adapter, ways and their rates; those last that leave the least harm."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for stem, one in read("equal-skill/*.json").items():
        adapter, _, seed = stem.partition("-s")
        found.setdefault(f"{adapter}-s{seed.partition('-')[0]}", []).append((one["way"], one))
    for adapter, ways in found.items():
        if repaired := kept_result(f"repair/{adapter}-with"):
            ways.append(("repair, by default", repaired))
        if planned := kept_result(adapter):
            ways.append(("calibrated plan", planned["after"]))
        ways.sort(key=lambda way: -way[1]["ASR"]["value"])
    return found


def equal_skill() -> str:
    parts = []
    for adapter, ways in at_equal_skill().items():
        rows = [
            (way, *(rate(one[name]) for name in ("ASR", "skill")), _removed(one))
            for way, one in ways
        ]
        parts.append(f"\n{adapter}:\n\n{table(('way', 'ASR', 'skill', 'removed'), rows)}")
        if top := kept_result(f"ceiling-{adapter}"):
            parts.append(
                f"\nGates learnt on the test prompts themselves (a ceiling): ASR"
                f" {rate(top['ASR'])}, skill {rate(top['skill'])}, score {score(top):.2f}.\n"
            )
    if not parts:
        return ""
    return (
        f"## At equal skill\n\nThe most that each way can remove with {LEAST_SKILL:g} of the"
        " skill kept: whole modules in an order, `scaling` of all of ΔW, and `Safe LoRA projected`,"
        " which projects modules. `removed` is the share of Σ‖ΔW‖_F². 50 prompts of each kind;"
        " repair and plan as in their tables.\n"
        + "".join(parts)
        + "\n![ASR at equal skill](equal-skill.png)\n"
    )


def _removed(one: Any) -> str:
    return f"{one['share']:.2f}" if "share" in one else ""


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
