"""The files that a policy names: one list for a server's start and reloads, `doctor` and `check`.

Torch takes seconds to import, so the modules that need it are imported when a policy names a file
of theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from s3lora_serve.plans.folder import PLAN_NAME, check_plans
from s3lora_serve.policy.schema import Policy
from s3lora_serve.signatures.trust import check_trusted


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """One file, or several of a kind."""

    name: str  # as `doctor` calls it
    is_named: Callable[[Policy], bool]
    check: Callable[[Policy], None]  # raises PolicyInvalid; nothing if the policy names none
    told: Callable[[Policy], tuple[str, bool]]  # what it is, and whether nothing about it is odd


def check_policy_files(policy: Policy) -> None:
    """Check all files that a policy names.

    Raises:
        PolicyInvalid: one of them cannot be used, or can be written by others.
    """
    for file in POLICY_FILES:
        file.check(policy)


def _told_plans(policy: Policy) -> tuple[str, bool]:
    """The folder of plans; its files are read at admissions."""
    assert policy.plans is not None  # noqa: S101 - `is_named`
    names = [file.name for file in policy.plans.iterdir()]
    unread = sorted(name for name in names if not PLAN_NAME.fullmatch(name))
    detail = f"{len(names) - len(unread)} in {policy.plans}"
    if policy.require_plan:
        detail += ", and no adapter without one"
    if unread:
        detail += f"; {unread[0][:80]!r} is not <sha256 of the weights>.json and is never read"
    return detail, not unread


def _check_reference(policy: Policy) -> None:
    if policy.scorer.reference is not None:
        from s3lora_serve.admission.scoring import check_reference

        check_reference(policy)


def check_named_statistics(policy: Policy) -> None:
    """Check the statistics that a policy names, if it names any.

    Raises:
        PolicyInvalid: they cannot be used, or can be written by others.
    """
    if policy.repair is not None:
        from s3lora_serve.admission.repairing import check_statistics

        check_statistics(policy)


def _told_statistics(policy: Policy) -> tuple[str, bool]:
    assert policy.repair is not None  # noqa: S101 - `is_named`
    return f"{policy.repair.statistics}, λ {policy.repair.strength:g}", True


def _names_signers(policy: Policy) -> bool:
    each = (policy, *policy.variants())
    return any(one.signatures.anyone or one.attestations.keys for one in each)


def _told_signers(policy: Policy) -> tuple[str, bool]:
    signers, attestations = policy.signatures, policy.attestations
    count = sum(map(len, (signers.keys, signers.certificates, signers.identities)))
    for_adapters = f"{count} for adapters{', required' if signers.require else ''}"
    required = ", required" if attestations.require else ""
    return f"{for_adapters}; {len(attestations.keys)} for verdicts{required}", True


POLICY_FILES = (
    PolicyFile("plans", lambda policy: policy.plans is not None, check_plans, _told_plans),
    PolicyFile(
        "reference",
        lambda policy: policy.scorer.reference is not None,
        _check_reference,
        lambda policy: (f"{policy.scorer.reference}, for {policy.scorer.name}", True),
    ),
    PolicyFile(
        "statistics",
        lambda policy: policy.repair is not None,
        check_named_statistics,
        _told_statistics,
    ),
    PolicyFile("signers", _names_signers, check_trusted, _told_signers),
)
"""In the order in which failures should be mended."""
