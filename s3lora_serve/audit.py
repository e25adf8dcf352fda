"""The audit log: one JSON line per decision, appended whole, so that processes can share it."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from s3lora_serve.verdict import Verdict


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends decisions to a file."""

    path: Path
    vllm_version: str

    def record(self, verdict: Verdict, door: str) -> None:
        """Append one line with a single write.

        Raises:
            OSError: the line could not be written.
        """
        line = json.dumps(self._entry(verdict, door), separators=(",", ":")) + "\n"
        descriptor = self._open()
        try:
            data = line.encode()
            if os.write(descriptor, data) != len(data):
                raise OSError(f"{self.path}: wrote only part of a line")
        finally:
            os.close(descriptor)

    def check(self) -> None:
        """See whether a line could be written.

        Raises:
            OSError: the file cannot be opened.
        """
        os.close(self._open())

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _entry(self, verdict: Verdict, door: str) -> dict[str, object]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "adapter": verdict.name,
            "path": verdict.path,
            "digest": verdict.digest,
            "door": door,
            "decision": verdict.decision.value,
            "reason": verdict.reason and verdict.reason.code,
            "mode": verdict.mode,
            "scorer": verdict.scorer,
            "policy_digest": verdict.policy_digest,
            "vllm_version": self.vllm_version,
            "stripped": list(verdict.stripped),
            "seconds": verdict.seconds.total,
        }
