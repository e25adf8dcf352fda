"""RESULTS.md and the README's table, from the outcome of each version."""

from collections.abc import Mapping
from typing import Any

from tests.support.marked import with_table

HEADER = """# vLLM versions

Written by `make compat` (`results.json` holds the data). Each version has an environment of its
own, made of `deploy/requirements-cpu.txt` and what `deploy/compat.toml` says it needs otherwise,
and runs the tests of the doors on real engines: {tests};
and vLLM's operations for GPUs in Triton's interpreter, as captured graphs skip in them.
A version that is built for GPUs only is not run: the hook's own check of names and signatures is
made on its source.

| vLLM | torch | transformers | peft | passed | failed | skipped | date |
|---|---|---|---|---|---|---|---|
"""


MARK = "<!-- written by make compat -->"


def markdown(results: Mapping[str, Mapping[str, Any]], tests: tuple[str, ...]) -> str:
    """The table, followed by the tests that did not pass."""
    text = HEADER.format(tests=", ".join(f"`{name}`" for name in tests))
    notes = []
    for version, found in results.items():
        text += f"| {_row(found)} |\n"
        notes += [f"- {version}: {name}" for name in found.get("unhappy", [])]
    return text + ("\nNot passed:\n\n" + "\n".join(notes) + "\n" if notes else "")


def in_readme(readme: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with its table of supported versions as the results have it."""
    lines = ["| vLLM | tests |", "|---|---|"]
    for found in results.values():
        ran = f"{found.get('passed')} passed, {found['failed']} failed"
        lines.append(f"| {found['vllm']} | {found.get('source', ran)} |")
    return with_table(readme, MARK, lines)


def _row(found: Mapping[str, Any]) -> str:
    packages = found.get("packages", {})
    if "source" in found:
        return f"{found['vllm']}, source only | | | | {found['source']} | | | {found['date']}"
    versions = [packages.get(name, "") for name in ("torch", "transformers", "peft")]
    counts = [str(found[name]) for name in ("passed", "failed", "skipped")]
    return " | ".join([found["vllm"], *versions, *counts, found["date"]])
