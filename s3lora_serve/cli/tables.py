"""Tables on the terminal. Names are chosen by adapters' owners and are never markup."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from s3lora_serve.admission.verdict import Decision, ModuleVerdict, Verdict
from s3lora_serve.launcher.check import Check

_COLOURS = {Decision.ADMITTED: "green", Decision.STRIPPED: "yellow", Decision.REJECTED: "red"}


class VerdictTable:
    """One line for each adapter, then its changed modules or its reason of refusal."""

    def __init__(self) -> None:
        self._table = Table("adapter", "decision", "modules", "stripped", "highest SSI", "ms")
        self._told: list[Text | Table] = []

    def add(self, verdict: Verdict) -> None:
        """Add one adapter."""
        indices = [module.ssi for module in verdict.modules if module.ssi is not None]
        self._table.add_row(
            plain(verdict.name),
            Text(_decided(verdict), _COLOURS[verdict.decision]),
            str(len(verdict.modules)) if verdict.modules else "-",
            str(len(verdict.stripped)) if verdict.modules else "-",
            f"{max(indices):.3f}" if indices else "-",
            f"{verdict.seconds.total * 1000:.1f}",
        )
        if vouched := _vouched(verdict):
            self._told.append(plain(f"{verdict.name}: {vouched}"))
        if verdict.reason:
            self._told.append(plain(f"{verdict.name}: {verdict.reason}"))
        elif any(module.changed for module in verdict.modules):
            self._told.append(_changed(verdict))

    def end(self) -> None:
        """Print all adapters."""
        console = Console()
        for part in (self._table, *self._told):
            console.print(part)


def _vouched(verdict: Verdict) -> str:
    """Who signed the adapter and who attested its verdict; empty if nobody did."""
    parts = []
    if by := verdict.signed_by:
        parts.append(f"signed by {by.subject or by.kind} ({by.kind} {by.id})")
    if attester := verdict.attested_by:
        scores = ", whose scores are taken" if verdict.scored_by == "attestation" else ""
        parts.append(f"attested at {attester.time} by key {attester.key}{scores}")
    return "; ".join(parts)


def _decided(verdict: Verdict) -> str:
    by = verdict.selected_by
    return f"{verdict.decision.value}{'' if by == 'index' or verdict.reason else f' ({by})'}"


def _changed(verdict: Verdict) -> Table:
    """The modules that are served changed, with what that removes."""
    partly = any(module.changed and not module.stripped for module in verdict.modules)
    table = Table(
        "changed module" if partly else "stripped module",
        "SSI",
        "alignment" if verdict.by_alignment else "relative",
        "σ̃₁",
        "rank",
        "‖ΔW‖²",
        *(("left" if verdict.repair else "removed",) if partly else ()),
        title=plain(_title(verdict)),
    )
    changed = [module for module in verdict.modules if module.changed]
    for module in sorted(changed, key=lambda module: -(module.strip_order or 0)):
        removed = "stripped" if module.stripped else _left(module)
        table.add_row(
            plain(module.name),
            _number(module.ssi),
            _number(module.alignment if verdict.by_alignment else module.relative_ssi),
            f"{module.spectrum[0]:.3g}" if module.spectrum else "-",
            str(module.rank),
            _share(module),
            *((removed,) if partly else ()),
        )
    return table


def _left(module: ModuleVerdict) -> str:
    """What is removed of a module, or what repair leaves of its effects: harmful, benign."""
    if module.residual is None or module.kept is None:
        return f"{module.removed_share:.1%}"
    return f"{module.residual:.0%}, {module.kept:.0%}"


def _title(verdict: Verdict) -> str:
    if verdict.selected_by == "plan":
        return f"{verdict.name}: {_plan(verdict)}"
    if (repair := verdict.repair) is not None:
        left = f"{repair.residual:.1%} left on refusals, {repair.kept:.1%} on benign inputs"
        found = "" if verdict.suspicion is None else f"; suspicion {verdict.suspicion:.3g}"
        counts = f"{len(verdict.repaired)} repaired, λ {repair.strength:.3g}"
        return f"{verdict.name}: {counts}; {left}{found}"
    return verdict.name


def _plan(verdict: Verdict) -> str:
    counts = f"{len(verdict.stripped)} stripped, {len(verdict.transformed)} transformed"
    return f"plan {(verdict.plan_digest or '')[:19]}…, {counts}"


def print_recheck(adapters: Sequence[dict[str, Any]]) -> None:
    """One line for each served adapter that the policy in force would decide otherwise."""
    changed = [each for each in adapters if each["differs"]]
    experiments = [each for each in adapters if each.get("experiment")]
    console = Console()
    console.print(f"{len(adapters)} served, {len(changed)} would be decided otherwise now")
    if experiments:
        console.print(_experiments(experiments))
    if not changed:
        return
    table = Table("adapter", "served as", "would be now", "why")
    for each in changed:
        table.add_row(
            plain(each["name"]),
            plain(_outcome(each["before"])),
            plain(_outcome(each["after"])),
            plain(_change(each["before"], each["after"])),
        )
    console.print(table)


def _experiments(adapters: Sequence[dict[str, Any]]) -> Table:
    """One line for each served experiment, with its settings."""
    table = Table("experiment", "its settings", "served as", "would be now")
    for each in adapters:
        own = each["experiment"]
        plan = {"plan": own["plan_digest"]} if own["plan_digest"] else {}
        table.add_row(
            plain(each["name"]),
            plain(json.dumps(own["settings"] | plan)),
            plain(_outcome(each["before"])),
            "closed" if own["closed"] else plain(_outcome(each["after"])),
        )
    return table


def _outcome(verdict: dict[str, Any]) -> str:
    stripped = sum(module["stripped"] for module in verdict["modules"])
    told = f"{stripped} of {len(verdict['modules'])} modules stripped"
    for change in ("transformed", "projected", "repaired"):
        if count := sum(module[change] for module in verdict["modules"]):
            told += f", {count} {change}"
    return f"{verdict['decision']} ({told})"


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    if after["reason"]:
        return f"{after['reason']['code']}: {after['reason']['message']}"
    if before["mode"] != after["mode"]:
        return f"mode {after['mode']}"
    if before["plan_digest"] != after["plan_digest"]:
        return _plan_change(before["plan_digest"], after["plan_digest"])
    names = [{m["name"] for m in v["modules"] if m["stripped"]} for v in (before, after)]
    signs = [f"-{name}" for name in names[1] - names[0]] + [f"+{n}" for n in names[0] - names[1]]
    return ", ".join(sorted(signs)[:4]) + (" …" if len(signs) > 4 else "")


def _plan_change(before: str | None, after: str | None) -> str:
    if before is None:
        return f"a plan appeared: {after}"
    return "its plan is gone" if after is None else f"its plan changed to {after}"


def print_checks(checks: Sequence[Check]) -> None:
    """One line for each check."""
    table = Table("check", "", "finding")
    for check in checks:
        mark = (
            ("ok", "green")
            if check.passed
            else ("no", "red")
            if check.essential
            else ("!", "yellow")
        )
        table.add_row(plain(check.name), Text(*mark), plain(check.detail))
    Console().print(table)


def plain(text: str) -> Text:
    """Text without markup, and without control characters that a terminal would obey.

    A table folds it: rows whose names were cut would read alike.
    """
    told = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return Text(told, overflow="fold")


def _share(module: ModuleVerdict) -> str:
    """A module's share of the adapter's ‖ΔW‖², short: tables are 80 columns wide."""
    if module.energy_share is None:
        return "-"
    return "negl." if module.negligible else f"{module.energy_share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
