"""The signers that a policy trusts: keys, certificates, identities, from the operator's files."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from s3lora_serve.adapter.operator_file import OPEN_FLAGS, contents
from s3lora_serve.errors import GateFailed, PolicyInvalid
from s3lora_serve.policy.schema import Policy
from s3lora_serve.policy.signatures import Identity, Signatures

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from model_signing.verifying import Config

MAX_TRUST_BYTES = 2**20
"""A key has 300 bytes, Sigstore's trust configuration some 10 kB."""

LIBRARIES = {"signatures": "model_signing", "attestations": "securesystemslib"}
"""What each part of the policy needs, from the extra [sign]."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """One signer that the policy trusts, and how a signature is verified against it."""

    kind: Literal["key", "certificate", "identity"]
    id: str
    verifier: "Callable[[], Config]"


def anchors(signatures: Signatures) -> Iterator[Anchor]:
    """Every signer that the policy trusts.

    Raises:
        GateFailed: a file cannot be read, does not hold what it should, or others than this user
            and root can write it.
    """
    for file in signatures.keys:
        yield Anchor("key", key_id(public_key(file)), partial(_by_key, file))
    for file in signatures.certificates:
        yield Anchor("certificate", _certificate_id(file), partial(_by_certificate, file))
    for who in signatures.identities:
        name = f"{who.identity} ({who.issuer})"
        yield Anchor("identity", name, partial(_by_identity, who, signatures.trust_root))


def _by_key(file: Path) -> "Config":
    from model_signing.verifying import Config

    return Config().use_elliptic_key_verifier(public_key=file)  # type: ignore[no-untyped-call]


def _by_certificate(file: Path) -> "Config":
    from model_signing.verifying import Config

    return Config().use_certificate_verifier(  # type: ignore[no-untyped-call]
        certificate_chain=[file]
    )


def _by_identity(who: Identity, trust_root: Path | None) -> "Config":
    from model_signing.verifying import Config

    return Config().use_sigstore_verifier(  # type: ignore[no-untyped-call]
        identity=who.identity, oidc_issuer=who.issuer, trust_config=trust_root
    )


def public_key(file: Path) -> "PublicKeyTypes":
    """The public key in a PEM file of the operator.

    Raises:
        GateFailed: the file cannot be read, holds no public key, or others than this user and root
            can write it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(_owned(file))
    except (ValueError, UnsupportedAlgorithm):
        raise GateFailed(f"{file} holds no public key in PEM") from None


def key_id(key: "PublicKeyTypes") -> str:
    """sha256 of the key in PEM, as model-signing names keys."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(pem).hexdigest()


def check_trusted(policy: Policy) -> None:
    """Check the files of the signers that a policy trusts, and that they can be used.

    Raises:
        PolicyInvalid: a library is not installed, or a file does not hold what it should, cannot
            be read, or can be written by others than this user and root.
    """
    if policy.mode == "off":
        return
    for each in (policy, *policy.variants()):
        parts = {"signatures": each.signatures.anyone, "attestations": bool(each.attestations.keys)}
        for part, used in parts.items():
            if used and find_spec(LIBRARIES[part]) is None:
                raise PolicyInvalid(f"{part}: install s3lora-serve with its extra [sign]")
        try:
            if each.signatures.anyone:
                _check_signers(each.signatures)
            for file in each.attestations.keys:
                public_key(file)
        except GateFailed as error:
            raise PolicyInvalid(error.problem) from None


def _check_signers(signatures: Signatures) -> None:
    if signatures.trust_root is not None:
        _owned(signatures.trust_root)
    for anchor in anchors(signatures):
        try:
            anchor.verifier()
        except Exception as error:  # noqa: BLE001 - the libraries' own, of many kinds
            raise GateFailed(f"signatures: {anchor.kind} {anchor.id}: {_line(error)}") from None


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _certificate_id(file: Path) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        first = x509.load_pem_x509_certificates(_owned(file))[0]
    except ValueError:
        raise GateFailed(f"{file} holds no certificate in PEM") from None
    return "sha256:" + first.fingerprint(SHA256()).hex()


def _owned(file: Path) -> bytes:
    try:
        return bytes(contents(os.open(file, OPEN_FLAGS), file, MAX_TRUST_BYTES, owned=True))
    except OSError as error:
        raise GateFailed(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise GateFailed(str(error)) from None
