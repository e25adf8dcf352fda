"""A Sigstore of our own: certificate authority, certificate log and transparency log.

It signs as the public one does, for identities that it is told, and writes the client trust
configuration that verifiers need. Each transparency log that it makes has one entry.
"""

import base64
import hashlib
import json
import struct
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

SCT_LIST = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
ORIGIN = "rekor.test"
NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sigstore.test")])
SHA256 = ec.ECDSA(hashes.SHA256())


class SigstoreInstance:
    """The keys of one instance."""

    def __init__(self) -> None:
        self.ca, self.ct, self.rekor = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self.start = datetime.now(UTC) - timedelta(days=1)
        self.root = (
            self._builder(self.ca, days=365)
            .subject_name(NAME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.ca.public_key()), critical=False
            )
            .sign(self.ca, hashes.SHA256())
        )

    def trust_config(self, file: Path) -> Path:
        """Write the client trust configuration."""
        began = {"start": self.start.isoformat()}

        def log(url: str, key: Any) -> dict[str, Any]:
            public = {
                "rawBytes": _b64(_spki(key)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": began,
            }
            name = {"keyId": _b64(_key_id(key))}
            return {
                "baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": public, "logId": name
            }  # fmt: skip

        authority = {
            "subject": {"organization": "test", "commonName": "sigstore.test"},
            "uri": "https://fulcio.test",
            "certChain": {"certificates": [{"rawBytes": _b64(_der(self.root))}]},
            "validFor": began,
        }
        kind = "application/vnd.dev.sigstore"
        root = {
            "mediaType": f"{kind}.trustedroot+json;version=0.1",
            "tlogs": [log("https://rekor.test", self.rekor)],
            "certificateAuthorities": [authority],
            "ctlogs": [log("https://ct.test", self.ct)],
        }
        signing = {"mediaType": f"{kind}.signingconfig.v0.2+json"}
        config = {
            "mediaType": f"{kind}.clienttrustconfig.v0.1+json",
            "trustedRoot": root,
            "signingConfig": signing,
        }
        file.write_text(json.dumps(config))
        return file

    def signed(self, payload: bytes, identity: str, issuer: str) -> dict[str, Any]:
        """The bundle of an in-toto payload, signed for an identity."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(key, identity, issuer)
        kind = "application/vnd.in-toto+json"
        pae = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
        signature = key.sign(pae, SHA256)
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": _digest(b""),
                "payloadHash": _digest(payload),
                "signatures": [
                    {
                        "signature": _b64(signature),
                        "verifier": _b64(certificate.public_bytes(Encoding.PEM)),
                    }
                ],
            },
        }
        envelope = {
            "payload": _b64(payload), "payloadType": kind, "signatures": [{"sig": _b64(signature)}]
        }  # fmt: skip
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": _b64(_der(certificate))},
                "tlogEntries": [self._entry(rfc8785.dumps(body))],
            },
            "dsseEnvelope": envelope,
        }

    def _entry(self, body: bytes) -> dict[str, Any]:
        """The only entry of a transparency log: its tree has one leaf, which is the root."""
        root, now = hashlib.sha256(b"\x00" + body).digest(), int(time.time())
        note = f"{ORIGIN}\n1\n{_b64(root)}\n"
        signed = _key_id(self.rekor)[:4] + self.rekor.sign(note.encode(), SHA256)
        promised = {
            "body": _b64(body), "integratedTime": now, "logID": _key_id(self.rekor).hex(),
            "logIndex": 0,
        }  # fmt: skip
        return {
            "logIndex": "0",
            "logId": {"keyId": _b64(_key_id(self.rekor))},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(now),
            "inclusionPromise": {
                "signedEntryTimestamp": _b64(self.rekor.sign(rfc8785.dumps(promised), SHA256))
            },
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": _b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 {ORIGIN} {_b64(signed)}\n"},
            },
            "canonicalizedBody": _b64(body),
        }

    def _certificate(self, key: Any, identity: str, issuer: str) -> x509.Certificate:
        unlogged = (
            self._builder(key, days=2)
            .subject_name(x509.Name([]))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.public_key()), False
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(ISSUER, issuer.encode()), critical=False)
        )
        tbs = unlogged.sign(self.ca, hashes.SHA256()).tbs_certificate_bytes
        logged = x509.UnrecognizedExtension(SCT_LIST, self._timestamp_list(tbs))
        return unlogged.add_extension(logged, critical=False).sign(self.ca, hashes.SHA256())

    def _timestamp_list(self, tbs: bytes) -> bytes:
        """The certificate log's promise, as RFC 6962 encodes it."""
        now = int(time.time()) * 1000
        entry = _key_id(self.ca) + struct.pack("!I", len(tbs))[1:] + tbs
        signature = self.ct.sign(
            struct.pack("!BBQH", 0, 0, now, 1) + entry + struct.pack("!H", 0), SHA256
        )
        promise = struct.pack("!B32sQH", 0, _key_id(self.ct), now, 0)
        promise += struct.pack("!BBH", 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(promise) + 2, len(promise)) + promise
        assert len(listed) < 256
        length = bytes([len(listed)]) if len(listed) < 128 else bytes([0x81, len(listed)])
        return b"\x04" + length + listed

    def _builder(self, key: Any, days: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .issuer_name(NAME)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.start)
            .not_valid_after(self.start + timedelta(days=days))
        )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _spki(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public


def _key_id(key: Any) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _digest(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
