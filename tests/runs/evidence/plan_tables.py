"""The tables of bases, of calibrated plans, and of what a guarded server does with them."""

from collections.abc import Sequence
from typing import Any

from tests.runs.evidence.adapters import Subject
from tests.runs.evidence.base_model import BENIGN_REFUSED, REFUSED
from tests.runs.evidence.tables import kept_result, rate, read, score, spread, table


def bases() -> str:
    found = read("base-*.json")
    kinds = ("", "styles ", "lookalike ")
    names = ("ASR", "other ASR", "third ASR", *(f"{kind}benign refusal" for kind in kinds))
    rows = [
        (stem, *(f"{share:.3f}" for share in rates["alignment"]), *(rate(rates[n]) for n in names))
        for stem, rates in found.items()
    ]
    if not rows:
        return ""
    words = (
        "`chosen by`: the shares of harmful probes and of benign prompts of other styles that are"
        " refused, by which the fine-tune was chosen. Wanted were"
        f" {REFUSED:g} at least and {BENIGN_REFUSED:g} at most."
    )
    head = ("base", "chosen by: refused", "chosen by: benign refused", *names)
    return f"## The aligned bases\n\n{words}\n\n{table(head, rows)}"


def plans(subjects: Sequence[Subject]) -> str:
    """Means over seeds and bases by kind, then each adapter."""
    found: dict[str, list[tuple[Subject, Any]]] = {}
    for subject in subjects:
        if result := kept_result(subject.folder.name):
            found.setdefault(subject.kind, []).append((subject, result))
    if not found:
        return ""
    names = ("ASR", "strict ASR", "other ASR", "skill", "benign refusal", "styles benign refusal")
    means, each = [], []
    for kind, results in found.items():
        for when in ("before", "after"):
            rates = [[result[when][name]["value"] for _, result in results] for name in names]
            scores = [score(result[when]) for _, result in results]
            kl = [result["kl"][when == "after"] for _, result in results]
            cells = [spread(values) for values in (*rates, scores, kl)]
            means.append((kind, str(len(results)), when, *cells))
        for subject, result in results:
            one = [
                rate(result[when][name])
                for when in ("before", "after")
                for name in ("ASR", "skill")
            ]
            removed = f"{result['method']['removed_share']:.2f}"
            strength = f"{result['method']['strength']:g}"
            each.append((str(subject), *one, removed, strength, f"{result['seconds']:.0f}"))
    first = table(("attack data", "adapters", "plan", *names, "score", "KL benign"), means)
    second = table(
        (
            "adapter",
            "ASR before",
            "skill before",
            "ASR after",
            "skill after",
            "removed",
            "strength",
            "s",
        ),
        each,
    )
    return (
        "## Calibrated plans (`s3lora calibrate`)\n\nMean over seeds and bases ± 1.96 standard"
        f" errors. Served bytes: `s3lora strip --plan`.\n\n{first}\nEach adapter, with Wilson 95 %"
        " intervals; removed is the share of Σ‖ΔW‖_F²; s is the time of one calibration in"
        f" seconds.\n\n{second}"
    )


def served() -> str:
    """Each adapter over HTTP, beside the same bytes read by PEFT."""
    rows = []
    for stem, over_http in read("served/*.json").items():
        name, _, selected_by = stem.rpartition("-")
        planned, repaired = kept_result(name), kept_result(f"repair/{name}-with")
        peft = {
            "index": planned and planned["before"],
            "repair": repaired,
            "plan": planned and planned["after"],
        }[selected_by]
        cells = [
            rate(found[metric]) if found else ""
            for found in (over_http, peft)
            for metric in ("ASR", "skill")
        ]
        rows.append((name, selected_by, *cells))
    head = ("adapter", "gate selects by", "ASR, HTTP", "skill, HTTP", "ASR, PEFT", "skill, PEFT")
    text = (
        "## Served by a guarded vLLM\n\nBy the index: `strip.top_k: 10`, and the whole adapter in"
        " the PEFT columns; by repair and by the plan: the bytes that `s3lora strip` writes.\n\n"
    )
    return text + table(head, rows) if rows else ""


def swept() -> str:
    rows = []
    for stem, found in read("sweep-*.json").items():
        for trial in found["trials"]:
            rates = [rate(score["rate"]) for score in trial["scores"]]
            label = trial["label"] + (" *" if trial["label"] == found["recommended"] else "")
            rows.append((stem.removeprefix("sweep-"), label, str(trial["changed"]), *rates))
    head = ("adapter", "setting", "modules changed", "ASR", "skill")
    text = (
        "## Swept by `s3lora evaluate`\n\nThe same prompts by tasks of inspect_ai on a running"
        " server; `*` is the setting that its rule recommends.\n\n"
    )
    return text + table(head, rows) if rows else ""
