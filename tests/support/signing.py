"""Keys, certificates and signatures on adapters, made by the model-signing command line."""

import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

SIGNATURE = "model.sig"


@dataclass(frozen=True)
class KeyPair:
    """A key pair in PEM files."""

    private: Path
    public: Path
    key: Any


def key_pair(folder: Path, name: str, key: Any = None) -> KeyPair:
    """A new key pair, P-256 unless a key is given."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return KeyPair(private, public, key)


def sign(folder: Path, pair: KeyPair, *options: str) -> Path:
    """Sign an adapter's folder with a key; the signature lies in the folder."""
    signature = folder / SIGNATURE
    command = ["key", str(folder), "--private_key", str(pair.private)]
    model_signing("sign", *command, "--signature", str(signature), *options)
    return signature


def model_signing(*arguments: str) -> str:
    """Run the command line of model-signing."""
    command = [sys.executable, "-m", "model_signing", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Certified:
    """A signing certificate under a root, in PEM files."""

    root: Path
    certificate: Path
    pair: KeyPair


def certified(folder: Path, name: str, organization: str = "Acme") -> Certified:
    """A root certificate and a certificate for signing that it issued."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} root")])
    root = _certificate(issuer, issuer, root_key, root_key, ca=True)
    pair = key_pair(folder, name)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
        ]
    )
    leaf = _certificate(subject, issuer, pair.key, root_key, ca=False)
    files = folder / f"{name}-root.crt", folder / f"{name}.crt"
    for file, certificate in zip(files, (root, leaf), strict=True):
        file.write_bytes(certificate.public_bytes(Encoding.PEM))
    return Certified(*files, pair)


def sign_with_certificate(folder: Path, signer: Certified) -> Path:
    """Sign an adapter's folder with a certificate; the signature lies in the folder."""
    signature = folder / SIGNATURE
    model_signing(
        "sign", "certificate", str(folder), "--signature", str(signature),
        "--private_key", str(signer.pair.private),
        "--signing_certificate", str(signer.certificate),
        "--certificate_chain", str(signer.root),
    )  # fmt: skip
    return signature


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: Any, issuer_key: Any, *, ca: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usage),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )
