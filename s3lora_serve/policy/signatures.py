"""The parts of the policy on signatures of adapters and on attestations of verdicts."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from s3lora_serve.policy.section import Digest, Section


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("expected the name of a file in the adapter's folder")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]
"""A file in the adapter's folder."""


class Identity(Section):
    """Who signs with Sigstore: an identity, and the OpenID Connect issuer that vouches for it."""

    identity: str
    """An e-mail address, or the URI of a workflow."""
    issuer: str
    """A URL."""


class Signatures(Section):
    """Who may sign an adapter's folder, in the format of OpenSSF Model Signing."""

    require: bool = False
    """Whether an unsigned adapter is refused ([signatures](signatures.md))."""
    keys: tuple[Path, ...] = ()
    """Public keys, PEM: P-256, P-384 or P-521."""
    certificates: tuple[Path, ...] = ()
    """Roots of trust, PEM."""
    identities: tuple[Identity, ...] = ()
    """`{identity, issuer}` of Sigstore."""
    trust_root: Path | None = None
    """Sigstore's client trust configuration, JSON."""
    file: FileName = "model.sig"  # the default of model-signing
    """In the adapter's folder."""

    @model_validator(mode="after")
    def _someone_can_sign(self) -> Self:
        if self.require and not self.anyone:
            raise ValueError("require: true needs keys, certificates or identities")
        if self.identities and self.trust_root is None:
            raise ValueError("identities need trust_root: the gate asks no server for one")
        return self

    @property
    def anyone(self) -> bool:
        """Whether the policy trusts any signer."""
        return bool(self.keys or self.certificates or self.identities)


class Attestations(Section):
    """Who may attest verdicts, as `s3lora attest` writes them."""

    require: bool = False
    """Whether an adapter without an attested verdict is refused ([signatures](signatures.md))."""
    keys: tuple[Path, ...] = ()
    """Public keys, PEM: Ed25519, ECDSA or RSA."""
    max_age: Annotated[float, Field(gt=0)] | None = None
    """Seconds; null: verdicts do not expire."""
    policy_digest: Literal["same", "any"] | Digest = "same"
    """`same`: under what decides in this policy; `any`: also under other policies; or one's
    digest."""
    trust_scores: bool = False
    """Whether attested scores take the place of the gate's own."""
    file: FileName = "s3lora-attestation.json"  # ours
    """In the adapter's folder."""

    @model_validator(mode="after")
    def _someone_can_attest(self) -> Self:
        if (self.require or self.trust_scores) and not self.keys:
            raise ValueError("require and trust_scores need keys")
        if self.trust_scores and self.policy_digest != "same":
            raise ValueError("trust_scores needs policy_digest: same")
        return self
