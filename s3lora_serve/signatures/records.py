"""Who vouched for an adapter, as verdicts carry it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Signer:
    """The trusted signer of an adapter's folder."""

    kind: Literal["key", "certificate", "identity"]
    id: str  # sha256 of the policy's key or certificate; an identity with its issuer
    subject: str | None = None  # of the signing certificate


@dataclass(frozen=True, slots=True)
class Attester:
    """The key that attested a verdict, and what it attested."""

    key: str  # sha256 of the policy's key
    time: str  # of the attested verdict, RFC 3339
    policy_digest: str  # of what decides in the policy that it was made under


@dataclass(frozen=True, slots=True)
class Vouchers:
    """Who vouched for one adapter."""

    signed_by: Signer | None = None
    attested_by: Attester | None = None

    @property
    def signer(self) -> str | None:
        """The id of the signer, as policies name it; None if there is none."""
        return self.signed_by.id if self.signed_by else None
