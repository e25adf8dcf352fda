"""Who vouches for an adapter at registration, and whether the policy still trusts them later."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.private_copy import PrivateCopy
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import (
    AdapterRejected,
    AttestationMissing,
    AttestationUntrusted,
    SignerUntrusted,
    Unsigned,
)
from s3lora_serve.policy.schema import Policy
from s3lora_serve.signatures.attestation import Attestation, attestation, check_in_force
from s3lora_serve.signatures.model_signature import signer
from s3lora_serve.signatures.records import Vouchers
from s3lora_serve.signatures.trust import anchors, key_id, public_key


@dataclass(frozen=True, slots=True)
class Vouched:
    """Who vouched for an adapter, and what the policy says of that."""

    by: Vouchers = field(default_factory=Vouchers)
    attestation: Attestation | None = None  # a trusted one
    objection: AdapterRejected | None = None  # in audit mode: for what enforce refuses the adapter


def vouch(
    folder: LocalFolder | RemoteFolder,
    copy: PrivateCopy,
    policy: Policy,
    into: Callable[[], Path] | None,
    check_deadline: Callable[[], None],
    before: Vouchers | None = None,
) -> Vouched:
    """The trusted signer and the trusted attestation of an adapter, as far as the policy asks.

    Args:
        folder: the adapter's folder, with its signature, its attestation and its other files.
        copy: the private copy of its two files.
        policy: the policy for this adapter, rules applied.
        into: gives the folder that holds the private copy; None: it is in memory.
        check_deadline: called between files; may raise to stop.
        before: who vouched for it when it was admitted; nothing is read of `folder` then.

    Raises:
        AdapterRejected: the policy requires one that is missing or does not do, and its mode is
            enforce.
    """
    try:
        if before is not None:
            check_still_trusted(before, policy)
            return Vouched(before)
        signed_by = signer(folder, copy, policy, into, check_deadline)
        attested = attestation(folder, copy, policy)
    except AdapterRejected as error:
        if policy.mode == "enforce":
            raise
        return Vouched(before or Vouchers(), objection=error)
    return Vouched(Vouchers(signed_by, attested.by if attested else None), attested)


def check_still_trusted(before: Vouchers, policy: Policy) -> None:
    """Check who vouched for an admitted adapter against the policy in force.

    The stored copy holds the adapter's bytes and who vouched for them, not their signatures.

    Raises:
        AdapterRejected: the policy requires a signer or an attestation that this one is not.
    """
    if policy.signatures.require:
        signed_by = before.signed_by
        if signed_by is None:
            raise Unsigned("it was admitted without a signature")
        trusted = {(anchor.kind, anchor.id) for anchor in anchors(policy.signatures)}
        if (signed_by.kind, signed_by.id) not in trusted:
            raise SignerUntrusted(f"the policy no longer names its {signed_by.kind} {signed_by.id}")
    if policy.attestations.require:
        attested_by = before.attested_by
        if attested_by is None:
            raise AttestationMissing("it was admitted without an attested verdict")
        if attested_by.key not in {key_id(public_key(key)) for key in policy.attestations.keys}:
            raise AttestationUntrusted(f"the policy no longer names its key {attested_by.key}")
        check_in_force(attested_by, policy)
