"""Output formats of `s3lora scan`. Memory does not grow with the number of adapters."""

import json
from enum import StrEnum
from typing import Protocol, TextIO

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.cli.tables import VerdictTable
from s3lora_serve.offline.sarif import SarifLog


class ScanFormat(StrEnum):
    """How `scan` prints."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    SARIF = "sarif"


class Output(Protocol):
    """Receives verdicts in their order."""

    def add(self, verdict: Verdict) -> None:
        """Write or keep one verdict."""

    def end(self) -> None:
        """Finish after the last verdict."""


class Json:
    """One JSON object, `{"adapters": […]}`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._before = '{"adapters": ['

    def add(self, verdict: Verdict) -> None:
        """Write one element."""
        text = json.dumps(verdict.as_json(), indent=2)
        self._file.write(f"{self._before}\n{text}")
        self._before = ","

    def end(self) -> None:
        """Close the object."""
        self._file.write("\n]}\n" if self._before == "," else f"{self._before}]}}\n")


class JsonLines:
    """One verdict on each line, flushed at once, so that it survives an interruption."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, verdict: Verdict) -> None:
        """Write one line."""
        self._file.write(json.dumps(verdict.as_json()) + "\n")
        self._file.flush()

    def end(self) -> None:
        """Nothing to do."""


class Sarif:
    """SARIF 2.1.0: one result for each stripped or rejected adapter."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._log = SarifLog()

    def add(self, verdict: Verdict) -> None:
        """Keep the result."""
        self._log.add(verdict)

    def end(self) -> None:
        """Write the log."""
        json.dump(self._log.as_json(), self._file, indent=2)
        self._file.write("\n")


def output_in(form: ScanFormat, file: TextIO) -> Output:
    """The output of a format; a table goes to the terminal."""
    if form is ScanFormat.TABLE:
        return VerdictTable()
    if form is ScanFormat.JSON:
        return Json(file)
    return JsonLines(file) if form is ScanFormat.JSONL else Sarif(file)
