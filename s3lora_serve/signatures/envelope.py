"""Signed statements: in-toto payloads in DSSE envelopes, by securesystemslib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3lora_serve.adapter.bounded_json import parse_json
from s3lora_serve.signatures.trust import key_id, public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""Source: in-toto Attestation Framework, Envelope."""

MAX_ENVELOPE_VALUES = 1000
"""An envelope has seven, and four for each further signature; its payload is one. Ours."""


def signed(payload: bytes, key: "PrivateKeyTypes") -> dict[str, Any]:
    """The envelope of a payload, as JSON values.

    Raises:
        ValueError: the key is of a kind that cannot sign.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import (  # type: ignore[attr-defined]
        CryptoSigner,
        SSlibKey,
    )

    public = key.public_key()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(public, keyid=key_id(public))))
    found: dict[str, Any] = envelope.to_dict()
    return found


def verified(data: bytes, keys: Sequence[Path]) -> tuple[bytes, str]:
    """The payload of an envelope that one of these keys signed, and the id of that key.

    Raises:
        ValueError: it is no envelope of an in-toto statement, or no key signed it.
        GateFailed: a key cannot be read.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import Error
    from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]

    trusted: list[Key] = []
    for file in keys:
        public = public_key(file)
        trusted.append(SSlibKey.from_crypto(public, keyid=key_id(public)))
    try:
        envelope = Envelope.from_dict(parse_json(data, MAX_ENVELOPE_VALUES))
        accepted = envelope.verify(trusted, threshold=1)
    except Error:
        raise ValueError(f"it is signed by none of the {len(keys)} keys") from None
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError):
        raise ValueError("it is not a DSSE envelope") from None
    if envelope.payload_type != PAYLOAD_TYPE:
        raise ValueError(f"its payload is {str(envelope.payload_type)[:80]!r}, not {PAYLOAD_TYPE}")
    return envelope.payload, next(iter(accepted))


def private_key(data: bytes, password: str | None) -> "PrivateKeyTypes":
    """The private key of a PEM file's bytes.

    Raises:
        ValueError: they are not one, or the password does not open it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(data, password.encode() if password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"no private key in PEM: {str(error).splitlines()[0]}") from None
