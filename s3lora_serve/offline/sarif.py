"""Verdicts as SARIF 2.1.0, for code-scanning pages.

Source: OASIS, Static Analysis Results Interchange Format Version 2.1.0.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from s3lora_serve.adapter.private_copy import WEIGHTS_NAME
from s3lora_serve.adapter.remote_storage import is_url
from s3lora_serve.admission.verdict import Decision, Verdict
from s3lora_serve.errors import meanings, rejections

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
SHARP = "S3LORA-SHARP"
"""Rule id of stripped adapters. The rule id of a rejection is its code."""

UNALIGNED = "S3LORA-UNALIGNED"
"""Rule id of adapters whose least aligned modules are stripped or projected."""

PLANNED = "S3LORA-PLAN"
"""Rule id of adapters that a plan changes."""

REPAIRED = "S3LORA-REPAIRED"
"""Rule id of adapters that are repaired."""

WHOLE_FILE = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}
"""Code-scanning pages require a line, but a weights file has none."""


class SarifLog:
    """The results of one run. An admitted adapter has no result."""

    def __init__(self) -> None:
        self._results: list[dict[str, Any]] = []
        self._rules = {rule["id"]: rule for rule in _rules()}
        self._rule_index = {id_: index for index, id_ in enumerate(self._rules)}

    def add(self, verdict: Verdict) -> None:
        """Add the result of one adapter, if it is rejected or stripped."""
        if verdict.decision is Decision.REJECTED and verdict.reason:
            self._add(verdict, verdict.reason.code, "error", verdict.reason.message)
        elif verdict.decision is Decision.STRIPPED and verdict.selected_by == "plan":
            counts = f"{len(verdict.stripped)} modules and transforms {len(verdict.transformed)}"
            message = f"Plan {verdict.plan_digest} strips {counts} of {len(verdict.modules)}"
            self._add(verdict, PLANNED, "note", message)
        elif verdict.decision is Decision.STRIPPED and verdict.repair is not None:
            left = f"{verdict.repair.residual:.1%} of its effect on refusals"
            kept = f"{verdict.repair.kept:.1%} on benign ones"
            counts = f"{len(verdict.repaired)} of {len(verdict.modules)} modules are repaired"
            stripped = f", {len(verdict.stripped)} stripped" if verdict.stripped else ""
            self._add(verdict, REPAIRED, "note", f"{counts}{stripped}: {left} is left, {kept}")
        elif verdict.decision is Decision.STRIPPED:
            changed = verdict.projected or verdict.stripped
            rule, found = (
                (UNALIGNED, "the least aligned") if verdict.by_alignment else (SHARP, "sharp")
            )
            count = f"{len(changed)} of {len(verdict.modules)} modules are {found}"
            action = "projected" if verdict.projected else "stripped"
            self._add(verdict, rule, "warning", f"{count} and are {action}: {', '.join(changed)}")

    def _add(self, verdict: Verdict, rule: str, level: str, message: str) -> None:
        place = {
            "artifactLocation": {"uri": _uri(verdict.path)},
            "region": WHOLE_FILE,
        }
        digest = {"adapter/v1": verdict.digest} if verdict.digest else {}
        self._results.append(
            {
                "ruleId": rule,
                "ruleIndex": self._rule_index[rule],
                "level": level,
                "message": {"text": message},
                "locations": [{"physicalLocation": place}],
                "partialFingerprints": digest,
                "properties": {"adapter": verdict.name, "policyDigest": verdict.policy_digest},
            }
        )

    def as_json(self) -> dict[str, Any]:
        """The whole log as JSON values."""
        driver = {
            "name": "s3lora",
            "semanticVersion": version("s3lora-serve"),
            "rules": list(self._rules.values()),
        }
        run = {"tool": {"driver": driver}, "results": self._results}
        return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rules() -> Iterator[dict[str, Any]]:
    yield _rule(
        SHARP,
        "SharpModules",
        "warning",
        "Sharp modules.",
        "The policy's strip rule picks modules whose updates concentrate in few directions (high"
        " Spectral Sharpness Index); the adapter is served without them.",
        "Look at the modules with `s3lora scan`, or `s3lora report` for their spectra. If they are"
        " wanted, change strip in the policy or list the adapter in allow.",
    )
    yield _rule(
        UNALIGNED,
        "UnalignedModules",
        "warning",
        "Unaligned modules.",
        "The policy's strip rule picks modules whose updates agree least with what alignment"
        " changed in the base model; they are stripped or projected.",
        "Look at the modules with `s3lora scan`. If they are wanted, change strip in the policy or"
        " list the adapter in allow.",
    )
    yield _rule(
        PLANNED,
        "ChangedByPlan",
        "note",
        "Changed by a plan.",
        "The operator's plan for this adapter says which modules are stripped or transformed, in"
        " the place of the policy's strip rule.",
        "Nothing, if the plan is wanted. Otherwise remove it from the policy's folder of plans.",
    )
    yield _rule(
        REPAIRED,
        "Repaired",
        "note",
        "Repaired.",
        "The adapter's update is projected away from what harmful prompts produce in the base"
        " model, as far as the policy's repair says.",
        "Nothing, if repair is wanted. A plan for the adapter takes its place and keeps more.",
    )
    short = meanings()
    for cause in rejections():
        meaning = f"{short[cause.code].capitalize()}."
        why = cause.__doc__ or meaning
        yield _rule(cause.code, cause.__name__, "error", meaning, why, cause.remedy)


def _rule(id_: str, name: str, level: str, meaning: str, why: str, remedy: str) -> dict[str, Any]:
    """A SARIF reportingDescriptor, with the texts that code-scanning pages show."""
    markdown = f"**What it means.** {why}\n\n**What to do.** {remedy}"
    return {
        "id": id_,
        "name": name,
        "shortDescription": {"text": meaning},
        "fullDescription": {"text": why},
        "help": {"text": f"{why} {remedy}", "markdown": markdown},
        "defaultConfiguration": {"level": level},
        "properties": {"tags": ["security", "lora"], "problem.severity": level},
    }


def _uri(folder: str) -> str:
    """The URI of the weights file, relative to the working folder if the file lies in it.

    Code-scanning pages resolve only paths relative to the checkout.
    """
    if is_url(folder):
        return quote(f"{folder}/{WEIGHTS_NAME}", safe=":/")
    absolute = Path(os.path.abspath(Path(folder) / WEIGHTS_NAME))  # noqa: PTH100 - drops .., keeps links
    if absolute.is_relative_to(Path.cwd()):
        return quote(str(absolute.relative_to(Path.cwd())))
    return absolute.as_uri()
