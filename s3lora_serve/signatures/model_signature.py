"""Verify the signature on an adapter's folder (OpenSSF Model Signing) on the private copy.

The signature is verified first, then the names of the files are compared with those that it covers.
Only then the files are read, each once and in parts: nothing is kept of them but digests.
"""

import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3lora_serve.adapter.local_folder import CHUNK_BYTES, LocalFolder
from s3lora_serve.adapter.other_files import file_names
from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME, PrivateCopy
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import (
    FilesUnsigned,
    GateFailed,
    SignedOtherwise,
    SignerUntrusted,
    Unsigned,
)
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.schema import Policy
from s3lora_serve.signatures.bundle import MAX_SIGNATURE_BYTES, Bundle, Coverage
from s3lora_serve.signatures.records import Signer
from s3lora_serve.signatures.trust import Anchor, anchors

if TYPE_CHECKING:
    from model_signing.hashing import Config as Hashing
    from model_signing.verifying import Config as Verifier

CHANGED = re.compile(r"Hash mismatch for \\?'(.*?)\\?': Expected")
"""How model-signing's message, a list's repr, names a changed file. The digests beside the name are
not shown: a link may lead to a file of others."""

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
        bundle = Bundle.of(signature)
        with tempfile.NamedTemporaryFile(dir=into() if into else None) as file:
            file.write(signature)
            file.flush()
            anchor, verifier = _trusted_signer(Path(file.name), policy)
            coverage = bundle.coverage()
            digests = _digests(folder, copy, coverage, policy, check_deadline)
            _compare(verifier, Path(file.name), digests)
        return Signer(anchor.kind, anchor.id, bundle.subject())
    except SignerUntrusted:
        if trusted.require:
            raise
        return None
    except OSError as error:
        raise GateFailed(f"the signature cannot be verified: {error.strerror}") from None


def _trusted_signer(signature: Path, policy: Policy) -> "tuple[Anchor, Verifier]":
    """Whose signature it is; nothing of the folder is read."""
    from s3lora_serve.signatures.folder_hashing import SignatureHolds, Unread

    trusted = list(anchors(policy.signatures))
    for anchor in trusted:
        try:
            verifier = anchor.verifier()
            _verify(verifier, signature, Unread())
        except SignatureHolds:
            return anchor, verifier
        except Exception:  # noqa: BLE001, S112 - its libraries' own, on a tenant's bytes
            continue
    raise SignerUntrusted(
        f"{policy.signatures.file} is of none of the {len(trusted)} signers that the policy names"
    )


def _verify(verifier: "Verifier", signature: Path, digests: "Hashing") -> None:
    verifier.set_hashing_config(digests)
    with _printing, redirect_stdout(sys.stderr):  # it prints warnings
        verifier.verify("", signature)


def _compare(verifier: "Verifier", signature: Path, digests: "Hashing") -> None:
    """Have model-signing compare the digests with the signed ones."""
    try:
        _verify(verifier, signature, digests)
    except Exception as error:  # noqa: BLE001 - its libraries' own, on a tenant's bytes
        changed = CHANGED.findall(str(error))
        raise SignedOtherwise(f"{_names(changed)} changed after it was signed") from None


def _digests(
    folder: LocalFolder | RemoteFolder,
    copy: PrivateCopy,
    coverage: Coverage,
    policy: Policy,
    check_deadline: Callable[[], None],
) -> "Hashing":
    """The digests of what a verified signature covers, which is all that the folder holds."""
    from s3lora_serve.signatures.folder_hashing import FolderManifest

    others = _covered_files(folder, coverage, policy)
    digests = FolderManifest(coverage.serialization, coverage.parts)
    digests.add(CONFIG_NAME, [copy.config])
    digests.add(WEIGHTS_NAME, _chunks(copy.weights), sha256=copy.digest)
    for name, chunks in _streamed(folder, others, policy.limits):
        digests.add(name, _checked(chunks, check_deadline))
    return digests


def _covered_files(
    folder: LocalFolder | RemoteFolder, coverage: Coverage, policy: Policy
) -> list[str]:
    """The other files of the folder, after a comparison of their names with the signed ones."""
    own = {CONFIG_NAME, WEIGHTS_NAME}
    if missing := sorted(own - coverage.names):
        raise SignedOtherwise(f"the signature does not cover {missing[0]}")
    beside = own | {policy.signatures.file, policy.attestations.file}
    others = [name for name in file_names(folder) if name not in beside]
    others = [name for name in others if not coverage.ignores(name)]
    if extra := sorted(set(others) - coverage.names):
        raise FilesUnsigned(f"the signature does not cover {_names(extra)}")
    if gone := sorted(coverage.names - own - set(others)):
        raise SignedOtherwise(f"the folder lacks {_names(gone)}, which the signature covers")
    return others


def _streamed(
    folder: LocalFolder | RemoteFolder, names: Sequence[str], limits: Limits
) -> Iterator[tuple[str, Iterator[Any]]]:
    """Each file with its contents in parts; together they have at most limits.max_bytes."""
    left = limits.max_bytes

    def counted(name: str) -> Iterator[Any]:
        nonlocal left
        try:
            for chunk in folder.chunks(name, left, limits):
                left -= len(chunk)
                yield chunk
        except FileNotFoundError:
            raise SignedOtherwise(f"the folder lacks {_names([name])}, which is signed") from None

    for name in names:
        yield name, counted(name)


def _checked(chunks: Iterator[Any], check_deadline: Callable[[], None]) -> Iterator[Any]:
    check_deadline()
    for chunk in chunks:
        yield chunk
        check_deadline()


def _chunks(data: memoryview) -> Iterator[memoryview]:
    return (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))


def _names(files: Sequence[str]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0][:200]!r}{more}" if files else "a file"
