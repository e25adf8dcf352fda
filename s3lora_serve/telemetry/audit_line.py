"""One line of the audit log: its fields, and the bounds on what adapters and clients choose.

What is cut stays recoverable: `cut` has the sha256 of the whole.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from s3lora_serve.telemetry.audit_event import AuditEvent

MAX_LINE_BYTES = 32 * 2**10
"""Bytes of a line with its newline. Ours: naming all 560 modules of a 70B adapter takes 29 kB."""

MAX_TEXT_BYTES = 1024
"""Bytes of one text as JSON, without its quotes. Ours: far above names and paths in ordinary use;
with one in each of a line's fields, the line stays within its bound."""

_MARK = "…"
_LISTS = ("stripped", "transformed", "projected", "repaired", "left_out")
_CUT_LIST_BYTES = 128  # `"transformed":{"sha256":"…","count":…},`, and the commas around it

Entry = dict[str, Any]


def line_of(event: AuditEvent, previous: str | None, vllm_version: str) -> bytes:
    """The line of an event with its newline; `previous` is the digest of the line before it."""
    cut: Entry = {}
    # `previous` is the first key, so that a line that is cut off still contains the digest.
    entry = {"previous": previous} | _bounded(_entry(event, vllm_version), "", cut)
    entry["cut"] = cut
    lists = {name: entry[name] for name in _LISTS}
    empty: Entry = {name: [] for name in _LISTS}
    room = MAX_LINE_BYTES - len(_json(entry | empty)) - 1 - _CUT_LIST_BYTES * len(_LISTS)
    for name in _LISTS:
        entry[name] = kept = _fitting(lists[name], room)
        room -= len(_json(kept))
        if len(kept) < len(lists[name]):
            whole = _json(lists[name])
            cut[name] = {"sha256": hashlib.sha256(whole).hexdigest(), "count": len(lists[name])}
    entry["cut"] = cut or None
    return _json(entry) + b"\n"


def _entry(event: AuditEvent, vllm_version: str) -> Entry:
    verdict = event.verdict
    return {
        "time": _rfc3339(datetime.now(UTC)),
        "event": event.event.value,
        "adapter": verdict.name,
        "path": verdict.path,
        "digest": verdict.digest,
        "stored_copy": event.stored_copy,
        "door": event.door or event.event.value,
        "asked_by": event.asked_by and asdict(event.asked_by),
        "decision": verdict.decision.value,
        "reason": verdict.reason and verdict.reason.code,
        "count": event.count,
        "since": event.since and _rfc3339(event.since),
        "failure": event.failure,
        "replaced_by": event.replaced_by and asdict(event.replaced_by),
        "mode": verdict.mode,
        "scorer": verdict.scorer,
        "policy_digest": verdict.policy_digest,
        "vllm_version": vllm_version,
        "selected_by": verdict.selected_by,
        "plan_digest": verdict.plan_digest,
        "signed_by": verdict.signed_by and asdict(verdict.signed_by),
        "attested_by": verdict.attested_by and asdict(verdict.attested_by),
        "scored_by": verdict.scored_by,
        "served_digest": verdict.served_digest,
        "stripped": list(verdict.stripped),
        "transformed": list(verdict.transformed),
        "projected": list(verdict.projected),
        "repaired": list(verdict.repaired),
        "left_out": list(verdict.left_out),
        "repair": verdict.repair and asdict(verdict.repair),
        "suspicion": verdict.suspicion,
        "seconds": verdict.seconds.total,
    }


def _bounded(value: Any, place: str, cut: Entry) -> Any:
    """The value with each text in its bound; `cut` gets the digests of those that were longer."""
    if isinstance(value, dict):
        return {
            key: _bounded(part, f"{place}.{key}" if place else key, cut)
            for key, part in value.items()
        }
    if not isinstance(value, str):
        return value
    if len(value) <= MAX_TEXT_BYTES and _size(value) <= MAX_TEXT_BYTES:
        return value
    whole = value.encode(errors="surrogatepass")
    cut[place] = {"sha256": hashlib.sha256(whole).hexdigest(), "bytes": len(whole)}
    return _start(value, MAX_TEXT_BYTES - _size(_MARK)) + _MARK


def _start(text: str, room: int) -> str:
    for place, character in enumerate(text[: room + 1]):
        room -= _size(character)
        if room < 0:
            return text[:place]
    return text


def _fitting(names: Sequence[str], room: int) -> list[str]:
    """The first names that take at most `room` bytes as a JSON list."""
    room -= len(b"[]")
    for place, name in enumerate(names):
        room -= _size(name) + len(b'"",')
        if room < 0:
            return list(names[:place])
    return list(names)


def _size(text: str) -> int:
    """Bytes of a text as JSON, without its quotes."""
    return len(json.dumps(text)) - 2


def _json(value: Any) -> bytes:
    # ASCII only, so that lone surrogates in a name are escaped too.
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _rfc3339(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
