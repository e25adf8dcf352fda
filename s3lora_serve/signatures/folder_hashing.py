"""The manifest of a signed folder, as model-signing makes it: digests of files, or of their parts.

The files are streamed, and the adapter's weights are not hashed a second time.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

import blake3
from model_signing import hashing, manifest

from s3lora_serve.errors import SignedOtherwise

HASHES: dict[object, Callable[[], Any]] = {
    "sha256": hashlib.sha256,
    "blake2b": hashlib.blake2b,
    "blake3": blake3.blake3,
}
"""The functions that model-signing has, by the names in its signatures."""


class SignatureHolds(Exception):
    """Not an error: model-signing asks for the folder's digests once a signature is verified."""


class Unread(hashing.Config):
    """In the place of the digests of a folder that has not been read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def hash(self, *_folder: object, **_files: object) -> manifest.Manifest:
        """Say that the signature holds.

        Raises:
            SignatureHolds: always.
        """
        raise SignatureHolds


class FolderManifest(hashing.Config):
    """The digests of a folder's files, made one file after the other."""

    def __init__(self, serialization: dict[str, Any], most: int) -> None:
        """Make digests as a signature of `most` parts says that its own were made.

        Raises:
            SignedOtherwise: it does not say so in a known way.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._items: list[manifest.ManifestItem] = []
        self._most = most
        self._serialization = serialization
        self._name = serialization.get("hash_type")
        size = serialization.get("shard_size", 0) if self._sharded else 1
        known = serialization.get("method") in ("files", "shards") and self._name in HASHES
        # A float, as protobuf writes numbers.
        if not known or not isinstance(size, int | float) or not 1 <= size < 2**63:
            raise SignedOtherwise("the signature's digests are of an unknown kind")
        self._shard_size = int(size)

    @property
    def _sharded(self) -> bool:
        return self._serialization.get("method") == "shards"

    def add(self, name: str, chunks: Iterable[Any], sha256: str | None = None) -> None:
        """Hash a file. `chunks` is its contents, not read if its `sha256` is known and will do.

        Raises:
            SignedOtherwise: the files have more parts than were signed.
        """
        if self._sharded:
            self._add_shards(name, chunks)
        elif sha256 is not None and self._name == "sha256":
            self._append(name, bytes.fromhex(sha256.removeprefix("sha256:")))
        else:
            digest = HASHES[self._name]()
            for chunk in chunks:
                digest.update(chunk)
            self._append(name, digest.digest())

    def _add_shards(self, name: str, chunks: Iterable[Any]) -> None:
        size = self._shard_size
        start = position = 0
        digest = HASHES[self._name]()
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                part = rest[: start + size - position]
                digest.update(part)
                position, rest = position + len(part), rest[len(part) :]
                if position == start + size:
                    self._append(name, digest.digest(), start=start, end=position)
                    start, digest = position, HASHES[self._name]()
        if position > start:
            self._append(name, digest.digest(), start=start, end=position)

    def _append(self, name: str, value: bytes, **part: int) -> None:
        if len(self._items) >= self._most:
            raise SignedOtherwise(f"{name[:200]!r} has more parts than were signed")
        label = f"{self._name}-sharded-{self._shard_size}" if part else str(self._name)
        digest = manifest.hashing.Digest(label, value)  # type: ignore[attr-defined]
        kind = manifest.ShardedFileManifestItem if part else manifest.FileManifestItem
        self._items.append(kind(path=PurePosixPath(name), digest=digest, **part))

    def hash(self, *_folder: object, **_files: object) -> manifest.Manifest:
        """The manifest, for model-signing to compare with the signed one."""
        how = manifest.SerializationType.from_args(self._serialization)
        return manifest.Manifest("", self._items, how)
