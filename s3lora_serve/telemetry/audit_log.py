"""The audit log: one JSON line per decision, with the digest of the line before it.

A line is appended as a whole, so processes can share a log. `audit_chain.py` checks the digests.
"""

import json
import os
from dataclasses import KW_ONLY, asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.telemetry.audit_chain import digest_of, last_line
from s3lora_serve.telemetry.audit_files import append, locked, numbered, opened, real, rotate

MAX_TEXT = 4096
"""Characters kept of a name or path, which tenants choose. Linux opens no longer path. With the
limits on what is read of an adapter, it keeps lines below `audit_chain.MAX_LINE_BYTES`."""


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends decisions to a file, and rotates the file before it exceeds `max_bytes`."""

    path: Path
    vllm_version: str
    _: KW_ONLY
    max_bytes: int
    keep: int

    def record(self, verdict: Verdict, door: str) -> None:
        """Append one line with a single write.

        Raises:
            OSError: the line could not be written.
        """
        path = real(self.path)
        with locked(path):
            with opened(path) as file:
                # The last line is read every time: another process may have appended to the file. A
                # digest cached by inode and size saves 9 µs, and is wrong if an inode is reused.
                size = os.fstat(file).st_size
                previous, ended = last_line(file)
                line = self._line(verdict, door, previous if size else _last_rotated(path))
                if not size or size + len(line) <= self.max_bytes:
                    # The partial line of a killed writer is evidence: it stays, on its own line.
                    append(file, line if ended else b"\n" + line)
                    return
            rotate(path, self.keep)
            # Opened by name again: the descriptor above belongs to the rotated file.
            with opened(path) as file:
                append(file, line)

    def check(self) -> None:
        """Check that a line could be written.

        Raises:
            OSError: the lock cannot be taken, or the file cannot be opened.
        """
        path = real(self.path)
        with locked(path), opened(path):
            pass

    def _line(self, verdict: Verdict, door: str, previous: bytes | None) -> bytes:
        # The first key, so that a line that is cut off still contains the digest.
        linked = {"previous": None if previous is None else digest_of(previous)}
        entry = linked | self._entry(verdict, door)
        # ASCII only, so that lone surrogates in a name are escaped too.
        return json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n"

    def _entry(self, verdict: Verdict, door: str) -> dict[str, object]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "adapter": _bounded(verdict.name),
            "path": _bounded(verdict.path),
            "digest": verdict.digest,
            "door": door,
            "decision": verdict.decision.value,
            "reason": verdict.reason and verdict.reason.code,
            "mode": verdict.mode,
            "scorer": verdict.scorer,
            "policy_digest": verdict.policy_digest,
            "vllm_version": self.vllm_version,
            "selected_by": verdict.selected_by,
            "plan_digest": verdict.plan_digest,
            "signed_by": verdict.signed_by and asdict(verdict.signed_by),
            "attested_by": verdict.attested_by and asdict(verdict.attested_by),
            "scored_by": verdict.scored_by,
            "served_digest": verdict.served_digest,
            "stripped": list(verdict.stripped),
            "transformed": list(verdict.transformed),
            "projected": list(verdict.projected),
            "seconds": verdict.seconds.total,
        }


def _last_rotated(path: Path) -> bytes | None:
    """The line before the first line of a new file; None if the log has no rotated file."""
    try:
        with opened(numbered(path, 1), os.O_RDONLY) as file:
            return last_line(file)[0]
    except FileNotFoundError:
        return None


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
