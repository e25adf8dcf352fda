"""Attested verdicts: what is attested of an adapter, and the check of one at the gate.

Source: in-toto Attestation Framework, Statement v1.
"""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME, PrivateCopy
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.errors import (
    AdapterRejected,
    AttestationMissing,
    AttestationOutdated,
    AttestationUntrusted,
    AttestedOther,
)
from s3lora_serve.policy.schema import Policy
from s3lora_serve.policy.section import Digest
from s3lora_serve.signatures.envelope import verified
from s3lora_serve.signatures.records import Attester

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:s3lora-serve:verdict:v1"
"""The version is a part of the name: what it means never changes."""

MAX_ATTESTATION_BYTES = 16 * 2**20
"""Scores of 560 modules with 256 singular values take 3 MB, and 4 MB in base64."""

SKEW = timedelta(minutes=5)
"""How far another machine's clock may be ahead. Ours, as in most token checks."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AttestedScore(_Record):
    """The scores of one module, as `ModuleScore` has them."""

    name: str
    ssi: float | None
    relative_ssi: float | None
    spectrum: tuple[float, ...]
    row_norm_mean: float
    column_norm_mean: float
    frobenius_norm: float
    cancellation: float
    alignment: float | None = None
    projected_share: float | None = None
    captured: float | None = None


class Predicate(_Record):
    """One verdict on an adapter, and the scores that it was made from."""

    time: AwareDatetime
    decision: Literal["admitted", "stripped"]  # what is rejected is not attested
    policy_digest: Digest  # of what decides in the policy: `Policy.deciding_digest`
    scorer: dict[str, Any]
    stripped: tuple[str, ...]
    projected: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    scores: tuple[AttestedScore, ...]
    versions: dict[str, str]


class Resource(_Record):
    """A file of the adapter."""

    name: str
    digest: dict[str, str]


class Statement(_Record):
    """An in-toto statement with a verdict."""

    model_config = ConfigDict(populate_by_name=True)
    type: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: tuple[Resource, ...]
    predicate_type: Annotated[Literal["urn:s3lora-serve:verdict:v1"], Field(alias="predicateType")]
    predicate: Predicate


class Attestation(_Record):
    """An attestation that the policy trusts."""

    statement: Statement
    by: Attester


def subject(copy: PrivateCopy) -> tuple[Resource, ...]:
    """An adapter's two files with their digests."""
    config = hashlib.sha256(copy.config).hexdigest()
    return (
        Resource(name=WEIGHTS_NAME, digest={"sha256": copy.digest.removeprefix("sha256:")}),
        Resource(name=CONFIG_NAME, digest={"sha256": config}),
    )


def attestation(
    folder: LocalFolder | RemoteFolder, copy: PrivateCopy, policy: Policy
) -> Attestation | None:
    """The trusted attestation in an adapter's folder; None if there is none, nor needs to be.

    Raises:
        AttestationMissing, AttestationUntrusted, AttestedOther, AttestationOutdated: the policy
            requires one, and this does not do.
        GateFailed: a key of the policy cannot be read.
    """
    wanted = policy.attestations
    if not wanted.keys:
        return None
    try:
        data = folder.file(wanted.file, MAX_ATTESTATION_BYTES, policy.limits)
        if data is None:
            raise AttestationMissing(f"{folder} has no {wanted.file}")
        found = _trusted(data, policy)
        _check(found, copy, policy)
    except AdapterRejected:
        if wanted.require:
            raise
        return None
    return found


def _trusted(data: bytes, policy: Policy) -> Attestation:
    file = policy.attestations.file
    try:
        payload, key = verified(data, policy.attestations.keys)
        statement = Statement.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AttestationUntrusted(f"{file}: {where}: {first['msg']}"[:300]) from None
    except ValueError as error:
        raise AttestationUntrusted(f"{file}: {error}") from None
    found = statement.predicate
    by = Attester(key, found.time.astimezone(UTC).isoformat(), found.policy_digest)
    return Attestation(statement=statement, by=by)


def _check(found: Attestation, copy: PrivateCopy, policy: Policy) -> None:
    file = policy.attestations.file
    attested = {each.name: each.digest for each in found.statement.subject}
    for each in subject(copy):
        if attested.get(each.name, {}).get("sha256") != each.digest["sha256"]:
            raise AttestedOther(f"{file} does not attest this {each.name}")
    check_in_force(found.by, policy)


def check_in_force(by: Attester, policy: Policy) -> None:
    """Check the age and the policy of an attested verdict.

    Raises:
        AttestationOutdated: it is too old, from the future, or made under another policy.
    """
    wanted = policy.attestations
    made, now = datetime.fromisoformat(by.time), datetime.now(UTC)
    if made > now + SKEW:
        raise AttestationOutdated(f"{wanted.file} is of {by.time}, which is in the future")
    if wanted.max_age is not None and (now - made).total_seconds() > wanted.max_age:
        raise AttestationOutdated(
            f"{wanted.file} is of {by.time}, older than attestations.max_age {wanted.max_age:g} s"
        )
    same = wanted.policy_digest == "same"
    expected = policy.deciding_digest if same else wanted.policy_digest
    if expected not in ("any", by.policy_digest):
        raise AttestationOutdated(
            f"{wanted.file} was made under the policy {by.policy_digest}, and {expected}"
            f" {'is in force' if same else 'is asked for'}"
        )
