"""What a signature of model-signing says: the files that it covers, and how they are hashed.

Nothing of it is true before the signature is verified.
"""

import base64
import binascii
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from s3lora_serve.adapter.bounded_json import parse_json
from s3lora_serve.errors import SignerUntrusted

MAX_SIGNATURE_BYTES = 4 * 2**20
"""A signature has some 150 bytes for each file of the folder, and a few kilobytes besides."""

MAX_BUNDLE_VALUES = 10_000
"""A bundle with three certificates has some 100. Ours."""

MAX_PAYLOAD_VALUES = 2**17
"""A payload has eight for each file, and `MAX_FILES` is 10 000. Ours."""

BUNDLE_KEYS = {"mediaType", "verificationMaterial", "dsseEnvelope"}
ENVELOPE_KEYS = {"payload", "payloadType", "signatures"}
"""Other keys are refused: protobuf's JSON has two spellings, and the gate reads the payload too."""

GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""What model-signing leaves out of every folder."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A signature file: a Sigstore bundle with an in-toto statement."""

    fields: dict[str, Any]

    @classmethod
    def of(cls, signature: bytes) -> "Bundle":
        """The bundle in a file.

        Raises:
            SignerUntrusted: there is none.
        """
        try:
            found = parse_json(signature, MAX_BUNDLE_VALUES)
        except ValueError:
            found = None
        envelope = found.get("dsseEnvelope") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(envelope, dict):
            raise SignerUntrusted("the signature is not a bundle of model-signing")
        surplus = (found.keys() - BUNDLE_KEYS) | (envelope.keys() - ENVELOPE_KEYS)
        if surplus:
            raise SignerUntrusted(
                f"the signature has a key {min(surplus)[:80]!r}, which no bundle has"
            )
        return cls(found)

    def coverage(self) -> "Coverage":
        """What the statement says of the files; nothing is covered if it cannot be read."""
        try:
            payload = base64.b64decode(self.fields["dsseEnvelope"]["payload"], validate=True)
            predicate = parse_json(payload, MAX_PAYLOAD_VALUES)["predicate"]
            names = [resource["name"] for resource in predicate["resources"]]
            how = predicate.get("serialization")
            return Coverage.of(names, how if isinstance(how, dict) else {})
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
            return Coverage.of([], {})

    def subject(self) -> str | None:
        """The subject of the signing certificate, if a certificate signed."""
        from cryptography import x509

        try:
            chain = self.fields["verificationMaterial"]["x509CertificateChain"]["certificates"]
            certificate = x509.load_der_x509_certificate(base64.b64decode(chain[0]["rawBytes"]))
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        return certificate.subject.rfc4514_string()[:300]


@dataclass(frozen=True, slots=True)
class Coverage:
    """The files that a signature covers."""

    names: frozenset[str]
    parts: int  # digests: one for each file, or for each part of a file
    serialization: dict[str, Any]  # how their digests are made
    ignored: frozenset[str]  # files and folders that were left out

    @classmethod
    def of(cls, resources: list[str], serialization: dict[str, Any]) -> "Coverage":
        """The coverage by the names of the signed parts, and how these were made."""
        if serialization.get("method") == "shards":  # file:start:end
            resources = [name.rpartition(":")[0].rpartition(":")[0] for name in resources]
        left_out = [*GIT, *serialization.get("ignore_paths", ())]
        return cls(
            frozenset(str(PurePosixPath(name)) for name in resources),
            len(resources),
            serialization,
            frozenset(str(PurePosixPath(path)) for path in left_out),
        )

    def ignores(self, name: str) -> bool:
        """Whether a file was left out, by itself or with a folder that it is in."""
        path = PurePosixPath(name)
        return not self.ignored.isdisjoint({name, *map(str, path.parents)})
