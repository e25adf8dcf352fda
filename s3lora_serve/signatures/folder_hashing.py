"""How model-signing hashes a signed folder, without a second pass over the adapter's weights."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from model_signing import hashing, manifest

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME

SERIALIZATION = {"method": "files", "hash_type": "sha256"}
"""What a signature has to say of its digests; that is model-signing's default."""


class FolderHashing(hashing.Config):
    """Hashes each file with sha256; the digest of the weights is that of the private copy."""

    def __init__(self, weights_digest: str) -> None:
        """Keep the private copy's digest, `sha256:` and hexadecimal digits."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights_digest = bytes.fromhex(weights_digest.removeprefix("sha256:"))

    def hash(
        self,
        model_path: hashing.PathLike,
        *,
        files_to_hash: Iterable[hashing.PathLike] | None = None,  # noqa: ARG002 - all are
    ) -> manifest.Manifest:
        """The manifest of a folder that holds a private copy and other files."""
        folder = Path(str(model_path))
        weights = folder / WEIGHTS_NAME
        others = super().hash(
            folder, files_to_hash=[file for file in folder.rglob("*") if file != weights]
        )
        digests = {each.identifier: each.digest for each in others.resource_descriptors()}
        if CONFIG_NAME in digests:  # not if the signature leaves it out
            digests[WEIGHTS_NAME] = replace(digests[CONFIG_NAME], digest_value=self._weights_digest)
        return manifest.Manifest(
            others.model_name,
            [
                manifest.FileManifestItem(path=Path(name), digest=digest)
                for name, digest in digests.items()
            ],
            manifest.SerializationType.from_args(others.serialization_type),
        )
