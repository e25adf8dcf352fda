"""The audit log: one JSON line for each event, with the digest of the line before it.

A line is appended as a whole, so processes can share a log. `audit_chain.py` checks the digests.
"""

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from s3lora_serve.telemetry.audit_chain import digest_of, last_line
from s3lora_serve.telemetry.audit_event import AuditEvent
from s3lora_serve.telemetry.audit_files import append, locked, numbered, opened, real, rotate
from s3lora_serve.telemetry.audit_line import line_of


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends events to a file, and rotates the file before it exceeds `max_bytes`."""

    path: Path
    vllm_version: str
    _: KW_ONLY
    max_bytes: int
    keep: int

    def record(self, event: AuditEvent) -> None:
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
                before = previous if size else _last_rotated(path)
                digest = None if before is None else digest_of(before)
                line = line_of(event, digest, self.vllm_version)
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


def _last_rotated(path: Path) -> bytes | None:
    """The line before the first line of a new file; None if the log has no rotated file."""
    try:
        with opened(numbered(path, 1), os.O_RDONLY) as file:
            return last_line(file)[0]
    except FileNotFoundError:
        return None
