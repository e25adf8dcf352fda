"""The owners of adapter names: who may load, replace and unload under a name."""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from s3lora_serve.errors import NotTheOwner
from s3lora_serve.policy.globs import GlobText, glob_matches
from s3lora_serve.policy.relaxing import is_fixed_folder
from s3lora_serve.policy.section import Section


def _fixed_folder(glob: str) -> str:
    if not is_fixed_folder(glob):
        raise ValueError("expected a folder before the first wildcard, as in /adapters/acme/**")
    return glob


FolderGlob = Annotated[GlobText, AfterValidator(_fixed_folder)]
"""A glob on real paths that begins with a folder: tenants choose what wildcards stand for."""

KeyDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""The start of the sha256 of an API key, as the audit log names keys."""


class Owner(Section):
    """Names, and where from and by whom alone adapters are registered under them."""

    names: GlobText
    """Glob of adapter names."""
    paths: tuple[FolderGlob, ...] = ()
    """An adapter must lie under one of these, or be signed by one of `signers`."""
    signers: tuple[str, ...] = ()
    """As `signed_by.id` in verdicts."""
    keys: tuple[KeyDigest, ...] = ()
    """First 16 hex digits of the sha256 of the API keys that may ask; none: any may load."""

    @model_validator(mode="after")
    def _bound_by_something(self) -> Self:
        if not (self.paths or self.signers or self.keys):
            raise ValueError("expected paths, signers or keys that own the names")
        return self

    def holds(self, path: str, signer: str | None) -> bool:
        """Whether an adapter from this real path, with this verified signer, is the owner's."""
        if not (self.paths or self.signers):
            return True
        return signer in self.signers or any(glob_matches(glob, path) for glob in self.paths)


def owner_of(owners: Sequence[Owner], name: str) -> Owner | None:
    """The owner of a name: the first one whose names match."""
    return next((owner for owner in owners if glob_matches(owner.names, name)), None)


def foreign_load(
    owners: Sequence[Owner], name: str, path: str, signer: str | None, asked_with: str | None
) -> NotTheOwner | None:
    """Why an adapter may not be loaded under a name; None if it may.

    Args:
        owners: the policy's.
        name: the adapter's name.
        path: its real path.
        signer: the id of its verified signer, if it has one.
        asked_with: the digest of the requester's API key, "" if it has none; None: nobody asked
            over HTTP, the operator's own start or program did.
    """
    owner = owner_of(owners, name)
    if owner is None:
        return None
    if owner.keys and asked_with is not None and asked_with not in owner.keys:
        return NotTheOwner(f"{name!r} is one of {owner.names!r}, and {_key(asked_with)} asks")
    if not owner.holds(path, signer):
        by = f"signed by {signer}" if signer else "unsigned"
        return NotTheOwner(f"{name!r} is one of {owner.names!r}; {path} is not its owner's ({by})")
    return None


def foreign_unload(
    owners: Sequence[Owner], name: str, asked_with: str | None
) -> NotTheOwner | None:
    """Why a client may not unload the adapter of a name; None if it may.

    An unload names no path and bears no signature: a key alone says who asks.
    """
    owner = owner_of(owners, name)
    if owner is None or (asked_with is not None and asked_with in owner.keys):
        return None
    return NotTheOwner(f"{name!r} is one of {owner.names!r}, and {_key(asked_with)} asks")


def _key(asked_with: str | None) -> str:
    return f"the API key {asked_with}" if asked_with else "nobody with a known API key"
