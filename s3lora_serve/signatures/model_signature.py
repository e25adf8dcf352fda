"""Verify the signature on an adapter's folder (OpenSSF Model Signing) on the private copy.

model-signing verifies a folder. It is given one that holds the private copy's two files and copies
of the others, so what it verifies cannot change afterwards.
"""

import base64
import binascii
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.other_files import other_files
from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME, PrivateCopy
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import (
    FilesUnsigned,
    GateFailed,
    SignedOtherwise,
    SignerUntrusted,
    Unsigned,
)
from s3lora_serve.policy.schema import Policy
from s3lora_serve.signatures.records import Signer
from s3lora_serve.signatures.trust import anchors

MAX_SIGNATURE_BYTES = 4 * 2**20
"""A signature has some 150 bytes for each file of the folder, and a few kilobytes besides."""

MISMATCH = "Signature mismatch"
"""How model-signing begins its message where the signature holds and the files do not fit it."""

CHANGED = re.compile(r"Hash mismatch for \\?'(.*?)\\?': Expected")
"""How its message, a list's repr, names a changed file. The digests beside the name are not shown:
a link may lead to a file of others."""

BUNDLE_KEYS = {"mediaType", "verificationMaterial", "dsseEnvelope"}
ENVELOPE_KEYS = {"payload", "payloadType", "signatures"}
"""Other keys are refused: protobuf's JSON has two spellings, and the gate reads the payload too."""

_printing = threading.Lock()


def signer(
    folder: LocalFolder | RemoteFolder,
    copy: PrivateCopy,
    policy: Policy,
    into: Callable[[], Path] | None,
    check_deadline: Callable[[], None],
) -> Signer | None:
    """Who of the policy's signers signed an adapter's folder; None if nobody has to.

    Args:
        folder: the adapter's folder, for its signature and its other files.
        copy: the private copy of its two files.
        policy: the policy for this adapter, rules applied.
        into: gives the folder that holds the private copy; None: it is in memory.
        check_deadline: called between files; may raise to stop.

    Raises:
        Unsigned, SignerUntrusted: the policy requires a signature, and there is none of its
            signers.
        SignedOtherwise, FilesUnsigned: a trusted signer signed other files.
        OverLimit: the folder holds more than the policy's limits allow.
        GateFailed: the files cannot be copied, or the policy's own cannot be read.
    """
    trusted = policy.signatures
    if not trusted.anyone:
        return None
    signature = folder.file(trusted.file, MAX_SIGNATURE_BYTES, policy.limits)
    if signature is None:
        if trusted.require:
            raise Unsigned(f"{folder} has no {trusted.file}")
        return None
    try:
        bundle = _bundle(signature)
        with _signed_folder(
            folder, copy, policy, into() if into else None, check_deadline
        ) as place:
            (place / "signature").write_bytes(signature)
            return _verified(place / "files", place / "signature", bundle, copy.digest, policy)
    except SignerUntrusted:
        if trusted.require:
            raise
        return None
    except OSError as error:
        raise GateFailed(f"the signature cannot be verified: {error.strerror}") from None


def _verified(
    files: Path, signature: Path, bundle: dict[str, Any], weights_digest: str, policy: Policy
) -> Signer:
    from s3lora_serve.signatures.folder_hashing import SERIALIZATION, FolderHashing

    predicate = _predicate(bundle)
    own, signed = {CONFIG_NAME, WEIGHTS_NAME}, _signed_names(predicate)
    usual = own <= signed and SERIALIZATION.items() <= _serialization(predicate).items()
    trusted = list(anchors(policy.signatures))
    for anchor in trusted:
        try:
            verifier = anchor.verifier()
            if usual:
                verifier.set_hashing_config(FolderHashing(weights_digest))
            with _printing, redirect_stdout(sys.stderr):  # it prints warnings
                verifier.verify(files, signature)
        except Exception as error:  # noqa: BLE001 - its libraries' own, on a tenant's bytes
            if str(error).startswith(MISMATCH):
                raise _mismatch(files, signed, str(error)) from None
            continue
        if missing := own - signed:
            raise SignedOtherwise(f"the signature does not cover {min(missing)}")
        return Signer(anchor.kind, anchor.id, _subject(bundle))
    raise SignerUntrusted(
        f"{policy.signatures.file} is of none of the {len(trusted)} signers that the policy names"
    )


def _mismatch(files: Path, signed: set[str], text: str) -> SignedOtherwise | FilesUnsigned:
    found = {str(f.relative_to(files)) for f in files.rglob("*") if f.is_file()}
    if extra := sorted(found - signed):
        return FilesUnsigned(f"the signature does not cover {_names(extra)}")
    if missing := sorted(signed - found):
        return SignedOtherwise(f"the folder lacks {_names(missing)}, which the signature covers")
    return SignedOtherwise(f"{_names(CHANGED.findall(text))} changed after it was signed")


def _names(files: Sequence[str]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0][:200]!r}{more}" if files else "a file"


@contextmanager
def _signed_folder(
    folder: LocalFolder | RemoteFolder,
    copy: PrivateCopy,
    policy: Policy,
    into: Path | None,
    check_deadline: Callable[[], None],
) -> Iterator[Path]:
    """A temporary folder whose `files` are those that a signature has to cover."""
    with tempfile.TemporaryDirectory(prefix="signed-", dir=into) as temporary:
        files = Path(temporary) / "files"
        files.mkdir()
        if into is None:
            (files / CONFIG_NAME).write_bytes(copy.config)
            (files / WEIGHTS_NAME).write_bytes(copy.weights)
        else:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                os.link(into / name, files / name)
        own = {CONFIG_NAME, WEIGHTS_NAME, policy.signatures.file, policy.attestations.file}
        for name, data in other_files(folder, own, policy.limits):
            check_deadline()
            target = files / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(data)
        yield Path(temporary)


def _bundle(signature: bytes) -> dict[str, Any]:
    try:
        found = json.loads(signature)
    except (ValueError, RecursionError):
        found = None
    envelope = found.get("dsseEnvelope") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(envelope, dict):
        raise SignerUntrusted("the signature is not a bundle of model-signing")
    if surplus := (found.keys() - BUNDLE_KEYS) | (envelope.keys() - ENVELOPE_KEYS):
        raise SignerUntrusted(f"the signature has a key {min(surplus)[:80]!r}, which no bundle has")
    return found


def _signed_names(predicate: dict[str, Any]) -> set[str]:
    """The files that a bundle names."""
    try:
        return {resource["name"] for resource in predicate["resources"]}
    except (KeyError, TypeError):
        return set()  # nothing is covered


def _serialization(predicate: dict[str, Any]) -> dict[str, Any]:
    """How the signed digests were made, as a bundle says before its signature is verified.

    If it lies, other digests are compared with the signed ones, and differ.
    """
    found = predicate.get("serialization")
    return found if isinstance(found, dict) else {}


def _predicate(bundle: dict[str, Any]) -> dict[str, Any]:
    """What a bundle says of the files; empty if it cannot be read."""
    try:
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        found = payload["predicate"]
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error):
        return {}
    return found if isinstance(found, dict) else {}


def _subject(bundle: dict[str, Any]) -> str | None:
    """The subject of the signing certificate, if a certificate signed."""
    from cryptography import x509

    try:
        chain = bundle["verificationMaterial"]["x509CertificateChain"]["certificates"]
        certificate = x509.load_der_x509_certificate(base64.b64decode(chain[0]["rawBytes"]))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return certificate.subject.rfc4514_string()[:300]
