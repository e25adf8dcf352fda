"""What a line of the audit log reports, and which refusals have one cause."""

import ipaddress
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from s3lora_serve.admission.verdict import Decision, Verdict

MAX_ADDRESS = 64
"""Characters of an address that tell requesters apart. The longest numeric one has 45."""

_SITE_BITS = 64  # of an IPv6 address; one client has all addresses of its /64


@dataclass(frozen=True, slots=True)
class Requester:
    """One client of the API server."""

    key: str | None  # the start of the sha256 of its API key; None: the server has no keys
    address: str | None  # its network address, or that of a proxy in front of the server


class Event(StrEnum):
    """What happened to an adapter."""

    DECISION = "decision"
    SCAN = "scan"  # a decision that registers nothing
    LOAD_FAILED = "load_failed"  # after it was admitted
    REPLACEMENT = "replacement"
    UNLOAD = "unload"
    RELOAD = "reload"
    QUARANTINE = "quarantine"
    EXPERIMENT_ENDED = "experiment_ended"  # by the gate: the policy closed it, or its time was over


Cause = tuple[str | None, Event, str | None]
"""Who asked, what for, and the reason's code. Not names and paths, which clients choose."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What is served under a name."""

    digest: str | None  # of the adapter's weights
    stored_copy: str | None  # name of its folder in the store


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event, or several refusals of one cause."""

    event: Event
    verdict: Verdict
    _: KW_ONLY
    door: str | None = None  # None: the event has no door, and its name is written there
    stored_copy: str | None = None  # name of the folder in the store; None: nothing is served
    asked_by: Requester | None = None  # None: nobody over HTTP, or not known in this process
    replaced_by: Copy | None = None
    failure: str | None = None  # why an admitted adapter was not loaded
    count: int = 1  # refusals that the line stands for
    since: datetime | None = None  # the first of them; None: the line was written at once
    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def cause(self) -> Cause | None:
        """What repeated refusals are counted by; None if the event has a line in any case."""
        if self.event not in (Event.DECISION, Event.SCAN):
            return None
        # Audit mode serves what it would refuse.
        if self.verdict.decision is not Decision.REJECTED or self.stored_copy is not None:
            return None
        code = self.verdict.reason.code if self.verdict.reason else None
        return _asker(self.asked_by), self.event, code


def _asker(requester: Requester | None) -> str | None:
    """The API key, which a client cannot vary, else the address."""
    if requester is None:
        return None
    if requester.key is not None or requester.address is None:
        return requester.key
    try:
        address = ipaddress.ip_address(requester.address)
    except ValueError:  # a proxy's word
        return requester.address[:MAX_ADDRESS]
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address), _SITE_BITS), strict=False))
    return str(address)
