"""How verdicts of a scan are printed, one after the other; memory does not grow with a sweep."""

import json
from enum import StrEnum
from typing import Protocol, TextIO

from s3lora_serve.sarif import SarifLog
from s3lora_serve.tables import VerdictTable
from s3lora_serve.verdict import Verdict


class Format(StrEnum):
    """How `scan` prints."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    SARIF = "sarif"


class Output(Protocol):
    """Takes verdicts in their order."""

    def add(self, verdict: Verdict) -> None:
        """One more."""

    def end(self) -> None:
        """That was the last."""


class Json:
    """The contract's object, `{"adapters": […]}`."""

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
    """One verdict a line, there at once: what was written survives an interruption."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, verdict: Verdict) -> None:
        """Write one line."""
        self._file.write(json.dumps(verdict.as_json()) + "\n")
        self._file.flush()

    def end(self) -> None:
        """All is written."""


class Sarif:
    """SARIF 2.1.0: one result for each adapter that is not admitted whole."""

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


def output_in(form: Format, file: TextIO) -> Output:
    """The output of a format; tables go to the terminal."""
    if form is Format.TABLE:
        return VerdictTable()
    if form is Format.JSON:
        return Json(file)
    return JsonLines(file) if form is Format.JSONL else Sarif(file)
