"""RESULTS.md and the README's table of architectures, from what the runs found."""

from collections.abc import Mapping
from typing import Any

from tests.support.marked import with_table

HEADER = """# Architectures

Written by `make architectures` (`results.json` holds the data), with {versions}. Each row is a tiny
random model made by transformers and an adapter made by PEFT on all of its linear modules, on two
real engines of vLLM's CPU build, guarded and stock. *As stock* says that, with nothing stripped,
answers (log-probabilities, embeddings or class scores, to 1e-4) and every buffer of the adapter's
slot are the same. *Stripped* says the same of three stripped modules beside an adapter from which
they were removed by hand. Where the CPU build has no kernels for LoRA on experts, the slot alone is
compared.

| architecture | modules | left out | as stock | stripped |
|---|---|---|---|---|
"""

MARK = "<!-- written by make architectures -->"


def markdown(results: Mapping[str, Mapping[str, Any]], versions: str) -> str:
    """The table, with vLLM's words where it serves no such model or adapter."""
    text = HEADER.format(versions=versions)
    notes = []
    for name, found in results.items():
        text += f"| {name} | {found.get('modules', '')} | {len(found.get('left_out', []))} | "
        text += f"{_as_stock(found)} | {_stripped(found)} |\n"
        if words := found.get("failed") or found.get("stock"):
            notes.append(f"- {name}, vLLM: {words}")
        if found.get("refused"):
            notes.append(f"- {name}, gate: {' '.join(found['refused'])}")
        if found.get("left_out"):
            notes.append(f"- {name}, left out: {', '.join(found['left_out'])}")
    return text + ("\n" + "\n".join(notes) + "\n" if notes else "")


def in_readme(readme: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with its table of architectures as the results have it."""
    groups: dict[str, list[str]] = {}
    for name, found in results.items():
        groups.setdefault(_group(found), []).append(name.replace(", ", " "))
    lines = ["| as stock vLLM | architectures |", "|---|---|"]
    lines += [f"| {group} | {', '.join(names)} |" for group, names in groups.items()]
    return with_table(readme, MARK, lines)


def holds(found: Mapping[str, Any]) -> bool:
    """Whether the gate did as it should: as stock where that serves, refused where it does not."""
    if found.get("failed"):
        return True
    if found["stock"]:
        return found["refused"] is not None
    return bool(found["acts"] and found["as_stock"] and found["as_by_hand"] and found["strips"])


def _group(found: Mapping[str, Any]) -> str:
    if found.get("failed"):
        return "vLLM has no LoRA for it"
    if found["stock"]:
        return "refused, as vLLM refuses it"
    return "the same, whole and stripped" if holds(found) else "**not the same**"


def _as_stock(found: Mapping[str, Any]) -> str:
    if found.get("failed"):
        return "vLLM has no LoRA for it"
    if found["stock"]:
        return f"vLLM refuses it; gate: {found['refused'][0] if found['refused'] else 'admits'}"
    return "yes" if found["as_stock"] else "**no**"


def _stripped(found: Mapping[str, Any]) -> str:
    if found.get("failed") or found["stock"]:
        return ""
    return "yes" if found["as_by_hand"] else "**no**"
