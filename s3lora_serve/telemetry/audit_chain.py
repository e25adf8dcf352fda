"""The digest chain of an audit log: each line contains the digest of the line before it.

The chain has no key. It shows changes inside the log. If all later lines were rewritten too, or the
end was cut off, only the comparison with a digest that was noted elsewhere shows it.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO

MAX_READ_BYTES = 64 * 2**20
"""Maximum length of a line that is read. Today's are far shorter (`audit_line.py`); earlier
versions wrote all names of an adapter, which take 48 MB in the largest header."""

MAX_BREAKS = 100
"""Maximum number of breaks that are described. Further breaks are only counted."""

_BLOCK = 8192
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", re.ASCII)
_START = re.compile(rb'\{"previous":(null|"sha256:[0-9a-f]{64}")')
_ABSENT = object()

Files = Sequence[tuple[str, BinaryIO, int]]
"""Name, stream and size of each file, oldest first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A break or a note, with the line that it is about."""

    place: str  # file:line
    text: str


@dataclass(slots=True)
class Chain:
    """The result of checking the files."""

    files: int
    lines: int = 0
    first: str | None = None  # time of the first line that has one
    last: str | None = None  # time of the last line that has one
    begins: str | None = None  # digest of the line before the first kept line
    ends: str | None = None  # digest of the last line
    from_start: bool = False  # whether the first kept line is the first that was ever written
    found: set[str] = field(default_factory=set)  # sought digests that are a line's, or `begins`
    breaks: list[Finding] = field(default_factory=list)
    broken: int = 0  # number of breaks, including those not described
    notes: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Line:
    place: str
    text: bytes
    ended: bool  # whether a newline follows
    digest: str
    entry: dict[str, Any] | None  # None if the line is not a JSON object


def digest_of(line: bytes) -> str:
    """sha256 of a line without its newline."""
    return "sha256:" + hashlib.sha256(line).hexdigest()


def last_line(descriptor: int) -> tuple[bytes | None, bool]:
    """The last line of a file without its newline, and whether the file ends with a newline.

    The file is read from its end. The line of an empty file is None.

    Raises:
        OSError: the file cannot be read, or its last line is longer than any line of this log.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        return None, True
    ended = os.pread(descriptor, 1, size - 1) == b"\n"
    start, block, held = size - ended, _BLOCK, b""
    while start > 0:
        if len(held) > MAX_READ_BYTES:
            raise OSError(errno.EINVAL, f"no audit log: no line in the last {len(held)} bytes")
        step = min(block, start)
        start, block = start - step, block * 2
        held = os.pread(descriptor, step, start) + held
        if (newline := held.rfind(b"\n")) >= 0:
            return held[newline + 1 :], ended
    return held, ended


def walk(files: Files, sought: Collection[str] = ()) -> Chain:
    """Check the chain through all files, and look for the sought digests of lines.

    Raises:
        OSError: a file cannot be read.
    """
    chain = Chain(files=len(files))
    pairs: list[tuple[_Line, _Line]] = []
    before: _Line | None = None
    for line in _lines(files):
        _count(chain, line, sought)
        if before is not None:
            if _follows(line, before):
                _note(chain, before, line)
            else:
                chain.broken += 1
                if len(pairs) < MAX_BREAKS:
                    pairs.append((before, line))
        before = line
    if before is not None:
        chain.ends = before.digest
        if before.entry is None and before.ended:
            chain.broken += 1
            chain.breaks.append(Finding(before.place, "is no entry: edited"))
        else:
            _note(chain, before, None)
    if pairs:
        places = _places(files, {str(_claim(line)) for _, line in pairs})
        chain.breaks[:0] = [_described(before, line, places) for before, line in pairs]
    return chain


def _lines(files: Files) -> Iterator[_Line]:
    for name, stream, size in files:
        stream.seek(0)
        number = 0
        while size > 0 and (data := stream.readline(min(size, MAX_READ_BYTES))):
            size -= len(data)
            number += 1
            text = data.removesuffix(b"\n")
            place = f"{name}:{number}"
            yield _Line(place, text, text != data, digest_of(text), _entry(text))


def _entry(text: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _count(chain: Chain, line: _Line, sought: Collection[str]) -> None:
    if not chain.lines:
        claim = _first_claim(line)
        chain.from_start = claim is None
        if isinstance(claim, str):
            chain.begins = claim
            chain.found |= {claim}.intersection(sought)
    chain.lines += 1
    chain.found |= {line.digest}.intersection(sought)
    if time := _time(line):
        chain.first = chain.first or time
        chain.last = time


def _time(line: _Line) -> str | None:
    time = line.entry.get("time") if line.entry else None
    if not isinstance(time, str) or not _TIME.fullmatch(time):
        return None
    try:
        datetime.fromisoformat(time)
    except ValueError:
        return None
    return time


def _first_claim(line: _Line) -> object:
    """The claim of the first kept line, also if it was cut off after its digest."""
    if line.entry is None and (start := _START.match(line.text)):
        return json.loads(start[1])
    return _claim(line)


def _claim(line: _Line) -> object:
    return line.entry.get("previous", _ABSENT) if line.entry else _ABSENT


def _follows(line: _Line, before: _Line) -> bool:
    if line.entry is not None:
        return _claim(line) == before.digest
    # The line was cut off during its write: the part that exists must have the expected start.
    start = _start(before)
    return start.startswith(line.text) or line.text.startswith(start)


def _start(before: _Line) -> bytes:
    return f'{{"previous":"{before.digest}"'.encode()


def _note(chain: Chain, line: _Line, after: _Line | None) -> None:
    """Note a line that a crash cut off. It is no tampering, and the chain includes its bytes."""
    if line.entry is not None and line.ended:
        return
    text = "torn: cut off while being written"
    if len(line.text) < len(_start(line)):
        text += ", too short to vouch for the line before it"
    elif after is None:
        text += ", and nothing was written since"
    chain.notes.append(Finding(line.place, text))


def _places(files: Files, digests: set[str]) -> dict[str, str]:
    return {line.digest: line.place for line in _lines(files) if line.digest in digests}


def _described(before: _Line, line: _Line, places: dict[str, str]) -> Finding:
    claim = _claim(line)
    if line.entry is None:
        return Finding(line.place, f"is no entry that follows {before.place}: edited")
    if not isinstance(claim, str):
        return Finding(line.place, "carries no digest of the line before it: put in, or edited")
    if claim in places:
        return Finding(line.place, f"follows {places[claim]}, not {before.place}: lines moved")
    if before.entry is None:
        return Finding(before.place, f"is no entry, and {line.place} follows another line: edited")
    return Finding(
        line.place, f"does not follow {before.place}: that was edited, or lines between removed"
    )
