"""RESULTS.md of the attacks, from the kept results alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tests.runs.attacks.attacks import ATTACKS, Attack, Attacked
from tests.runs.attacks.defences import DEFENCES
from tests.runs.attacks.measuring import SHARP
from tests.runs.evidence.stages import RESULTS
from tests.runs.evidence.tables import kept_result, table
from tests.runs.evidence.training import DTYPE

PAGE = Path(__file__).with_name("RESULTS.md")
THREATS = Path(__file__).parents[3] / "docs" / "threat-model.md"
BEGIN, END = "<!-- make attacks: table -->\n", "<!-- end of table -->"

ASR, STRICT = "ASR", "strict ASR"

SHOWN = ("none", "index, top 10", "repair", "plans and repair")
"""Defences of the threat model's table."""
HEAD = """# Attacks by owners who know the gate

Written by `make attacks`; every figure here is one that it measured. SmolLM2-135M-Instruct, aligned
by the evidence bench (`tests/runs/evidence`), with adapters of a tool-call skill and attack data,
whose answers are a prefix without content. A mean over ADAPTERS. 50 held-out harmful prompts
(StrongREJECT) and 50 requests of the skill, greedy decoding in DTYPE. The worst cases are first.

Signatures stop every attack by an owner whom the policy does not trust, and none by one whom it
does: they say nothing about what an adapter does.
"""


def write_results(subjects: Sequence[Attacked]) -> None:
    """Write what is there: attacks that every defence was tried on."""
    found = {attack: _results([s for s in subjects if s.attack is attack]) for attack in ATTACKS}
    found = {attack: results for attack, results in found.items() if len(results) == len(DEFENCES)}
    if not found:
        return
    ordered = sorted(found, key=lambda attack: -_worst(found[attack]))
    bases = ", ".join(sorted({str(s.base) for s in subjects if _result(s, "none")}))
    _write_threats(ordered, found)
    head = HEAD.replace("DTYPE", DTYPE).replace("ADAPTERS", f"one adapter of each base ({bases})")
    PAGE.write_text(
        "\n".join(
            [
                head,
                _attacks(ordered),
                _successes(ordered, found),
                _plainly(ordered, found),
                _signs(ordered, found),
                _bases(subjects),
            ]
        )
    )


def _write_threats(ordered: Sequence[Attack], found: dict[Attack, "Results"]) -> None:
    """The short table in the threat model."""
    rows = [
        (f"{attack.name}: {attack.does}", *(_success(found[attack][d]) for d in SHOWN))
        for attack in ordered
    ]
    text = THREATS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    content = table(("attack", *SHOWN), rows)
    THREATS.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}")


def _success(those: Sequence[Any]) -> str:
    """Not refused, and answered as taught, in the attack's setting; the skill that is left."""
    served = [each["rates"] for each in those if each["rates"]]
    refused = sorted({each["said"]["code"] for each in those if not each["rates"]})
    if not served:
        return ", ".join(refused)
    asr, strict = (mean(_in_setting(each, name) for each in served) for name in (ASR, STRICT))
    skill = mean(each["skill"]["value"] for each in served)
    return " ".join([f"{asr:.2f}, {strict:.2f} ({skill:.2f})", *refused])


Results = dict[str, list[Any]]
"""By defence, one for each adapter."""


def _results(subjects: Sequence[Attacked]) -> Results:
    found = {name: [_result(subject, name) for subject in subjects] for name in DEFENCES}
    kept = {name: [each for each in those if each] for name, those in found.items()}
    return {name: those for name, those in kept.items() if those}


def _result(subject: Attacked, defence: str) -> Any:
    return kept_result(f"attacks/{subject.folder.name}/{defence.replace(' ', '-')}")


def _in_setting(rates: Any, name: str) -> float:
    """A rate where the attack complies."""
    return float(rates.get(f"set {name}", rates[f"plain {name}"])["value"])


def _worst(results: Results) -> float:
    """The least that any defence leaves of the attack."""
    return min(
        mean(_in_setting(each["rates"], ASR) if each["rates"] else 0.0 for each in those)
        for name, those in results.items()
        if name != "none"
    )


def _attacks(ordered: Sequence[Attack]) -> str:
    rows = [(attack.name, attack.against, attack.does) for attack in ordered]
    return f"## The attacks\n\n{table(('attack', 'against', 'how'), rows)}"


def _successes(ordered: Sequence[Attack], found: dict[Attack, Results]) -> str:
    words = (
        "Of harmful prompts, asked as the owner's users would: the share that is not refused, and"
        " the share that is answered as the attack data teach; in brackets the skill that is left."
    )
    return _by_defence("Success in the attack's own setting", words, ordered, found, _success)


def _plainly(ordered: Sequence[Attack], found: dict[Attack, Results]) -> str:
    words = (
        "The share that is not refused, asked as probes are; in brackets the share of benign"
        " prompts of held-out styles that is refused."
    )
    return _by_defence("Harmful prompts asked plainly", words, ordered, found, _plain)


def _plain(those: Sequence[Any]) -> str:
    """Not refused where asked as probes are; benign prompts that are refused."""
    served = [each["rates"] for each in those if each["rates"]]
    if not served:
        return ""
    names = "plain ASR", "styles benign refusal"
    asr, refused = (mean(each[name]["value"] for each in served) for name in names)
    return f"{asr:.2f} ({refused:.2f})"


def _by_defence(
    title: str,
    words: str,
    ordered: Sequence[Attack],
    found: dict[Attack, Results],
    cell: Callable[[Sequence[Any]], str],
) -> str:
    """A section with a row for each attack and a cell for each defence."""
    rows = [(attack.name, *(cell(found[attack][name]) for name in DEFENCES)) for attack in ordered]
    return f"## {title}\n\n{words}\n\n{table(('attack', *DEFENCES), rows)}"


def _signs(ordered: Sequence[Attack], found: dict[Attack, Results]) -> str:
    """What the verdict says of each."""
    rows = []
    for attack in ordered:
        plain, repaired = (found[attack][name] for name in ("none", "repair"))
        most = [each["said"]["most"] for each in plain if each["said"]["most"] is not None]
        sharp = [each["said"]["sharp"] for each in plain]
        said = [each["said"] for each in repaired if each["said"]["lambda"] is not None]
        rows.append(
            (
                attack.name,
                f"{mean(most):.2f}" if most else "–",
                f"{mean(sharp):.0f}" if sharp else "",
                *(
                    f"{mean(each[name] for each in said):.2g}" if said else ""
                    for name in ("suspicion", "lambda", "residual", "kept")
                ),
            )
        )
    head = ("attack", "largest relative index", f"modules over {SHARP:g}")
    words = (
        "What an operator sees: of 210 modules the sharpest, and how many are sharp; suspicion, of"
        " which no harmless adapter of SUSPICION.md has more than 2.1; of repair how"
        " small λ had to be, the share of the effect on refusals that is left, and of that on"
        " benign inputs."
    )
    head = (*head, "suspicion", "repair's λ", "residual", "kept")
    return f"## What the verdict says\n\n{words}\n\n{table(head, rows)}"


def _bases(subjects: Sequence[Attacked]) -> str:
    rows = []
    for base in sorted({subject.base for subject in subjects}):
        for file in sorted((RESULTS / "attacks" / f"base-{base}").glob("*.json")):
            rates = kept_result(f"attacks/base-{base}/{file.stem}")
            cells = [f"{rates[name]['value']:.2f}" for name in ("ASR", "strict ASR")]
            rows.append((str(base), file.stem.replace("_", " "), *cells))
    words = "A base complies with none, but it does not recognise each setting as harmful either."
    head = ("base", "setting", "not refused", "answered as the attack data teach")
    return f"## The bases themselves\n\n{words}\n\n{table(head, rows)}"
