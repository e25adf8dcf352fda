"""Attest the verdict on an adapter: a signed in-toto statement that a gate can require."""

from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3lora_serve.adapter.local_folder import opened_folder
from s3lora_serve.adapter.private_copy import PrivateCopy
from s3lora_serve.adapter.remote_storage import RemoteFolder, folder_name
from s3lora_serve.admission.admit import Admission, admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.policy.schema import Policy
from s3lora_serve.policy.signatures import Attestations
from s3lora_serve.signatures.attestation import (
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    AttestedScore,
    Predicate,
    Statement,
    subject,
)
from s3lora_serve.signatures.envelope import signed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes


def attest_adapter(
    folder: Path | RemoteFolder,
    key: "PrivateKeyTypes",
    policy: Policy,
    device: str = "auto",
    *,
    name: str | None = None,
    base_model: str | None = None,
) -> tuple[Verdict, dict[str, Any] | None]:
    """The verdict on an adapter, and its attestation as JSON values; None if it is rejected.

    Its own scores are attested, whatever the policy says of attestations. `name` and `base_model`
    are what the policy's rules match; None: the folder's name, and no base model.

    Raises:
        ValueError: the key cannot sign.
    """
    name = name or folder_name(folder)
    with opened_folder(folder) as opened:
        effective = policy.for_adapter(name, opened.real_path, base_model)
        own = effective.model_copy(update={"attestations": Attestations(), "rules": ()})
        admission = admit(
            opened, name, own, device=device, circumstances=Circumstances(base_model=base_model)
        )
    if admission.adapter is None or admission.verdict.decision == "rejected":
        return admission.verdict, None
    statement = _statement(admission.adapter.copy, admission, effective)
    return admission.verdict, signed(statement.model_dump_json(by_alias=True).encode(), key)


def _statement(copy: PrivateCopy, admission: Admission, effective: Policy) -> Statement:
    verdict = admission.verdict
    return Statement(
        type=STATEMENT_TYPE,
        subject=subject(copy),
        predicate_type=PREDICATE_TYPE,
        predicate=Predicate(
            time=datetime.now(UTC),
            decision="stripped" if verdict.decision == "stripped" else "admitted",
            policy_digest=effective.deciding_digest,
            scorer=verdict.scorer,
            stripped=verdict.stripped,
            projected=verdict.projected,
            repaired=verdict.repaired,
            scores=tuple(
                AttestedScore.model_validate({k: v for k, v in asdict(s).items() if k != "finite"})
                for s in admission.scores
            ),
            versions={"s3lora-serve": version("s3lora-serve"), "torch": version("torch")},
        ),
    )
