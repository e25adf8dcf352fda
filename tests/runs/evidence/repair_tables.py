"""The tables of repair: by kind of adapter, and by λ."""

from collections.abc import Sequence
from typing import Any

from tests.runs.evidence.adapters import Subject
from tests.runs.evidence.repair import EFFECTS
from tests.runs.evidence.tables import kept_result, spread, table

RATES = (
    ("ASR", "ASR"),
    ("other ASR", "HarmBench"),
    ("third ASR", "third set"),
    ("skill", "skill"),
    ("benign refusal", "familiar"),
    ("styles benign refusal", "other styles"),
    ("lookalike benign refusal", "lookalikes"),
)


SAID = ("lambda", "kept")
"""What the verdict says."""


def repairs(subjects: Sequence[Subject]) -> str:
    """Means over seeds and bases, under statistics with the skill's requests and without."""
    rows = []
    for kind in dict.fromkeys(subject.kind for subject in subjects):
        those = [subject for subject in subjects if subject.kind == kind]
        for setting in ("with", "without"):
            found = _kept(those, f"repair/{{}}-{setting}")
            if not found:
                continue
            cells = [spread([each[name]["value"] for each in found]) for name, _ in RATES]
            said = [spread([each["said"][name] for each in found]) for name in SAID]
            rows.append((kind, str(len(found)), setting, *cells, *said))
    if not rows:
        return ""
    names = [shown for _, shown in RATES]
    head = ("attack data", "adapters", "skill's requests", *names, "λ", "kept")
    return (
        "## Repair at admission (`repair` in the policy)\n\nMean over seeds and bases ± 1.96"
        " standard errors, of the bytes that `s3lora strip --repair` writes, by default. Statistics"
        " are made once for a base, of the operator's probes and of requests of both"
        " skills; `without`: of none of the adapter's own skill. Nothing is learnt on the adapters."
        f" λ and kept are what the verdict says.\n\n{table(head, rows)}"
    )


def sweeps(subjects: Sequence[Subject]) -> str:
    """What each `max_effect` does, for the adapters of the first seed."""
    rows = []
    for subject in subjects:
        for most in EFFECTS:
            for one in _kept([subject], f"repair-sweep/{{}}-{most:g}"):
                cells = [f"{one[name]['value']:.2f}" for name in ("ASR", "skill")]
                said = [f"{one['said'][name]:.3g}" for name in ("lambda", "effect", "kept")]
                rows.append((str(subject), f"{most:g}", *cells, *said))
    if not rows:
        return ""
    head = ("adapter", "max_effect", "ASR", "skill", "λ", "effect", "kept")
    words = "The sweep that the default of `max_effect` comes from; 50 prompts of each kind."
    return f"## The bound of repair\n\n{words}\n\n{table(head, rows)}"


def _kept(subjects: Sequence[Subject], pattern: str) -> list[Any]:
    found = [kept_result(pattern.format(subject.folder.name)) for subject in subjects]
    return [each for each in found if each]
