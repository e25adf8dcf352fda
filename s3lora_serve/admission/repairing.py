"""Repair an adapter as the policy says, and state what that leaves."""

from collections.abc import Callable
from functools import partial

from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.adapter.tensor_file import check_owner
from s3lora_serve.admission.decision import Outcome
from s3lora_serve.admission.verdict import RepairFacts
from s3lora_serve.errors import PolicyInvalid, RepairImpossible, StatisticsInvalid
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.apply import RepairedAdapter, repaired
from s3lora_serve.repair.statistics_file import StatisticsFile, loaded_statistics
from s3lora_serve.spectral import resolve_device
from s3lora_serve.spectral.fallback import attempt


def repair_of(
    adapter: Adapter,
    policy: Policy,
    outcome: Outcome,
    device: str,
    check_deadline: Callable[[], None],
) -> RepairedAdapter | None:
    """The repaired adapter; None if the policy repairs none, or it has no module to repair.

    A device that fails leaves the work to the CPU, as in scoring.

    Raises:
        RepairImpossible: as `repaired`.
        StatisticsInvalid: they cannot be read, or are not those that were there with the policy.
    """
    statistics = statistics_of(policy)
    if statistics is None or policy.repair is None:
        return None
    work = partial(repaired, adapter, statistics, policy.repair, outcome.stripped)
    if (chosen := resolve_device(device)) != "cpu":

        def on_device(between: Callable[[], None]) -> RepairedAdapter | RepairImpossible | None:
            try:
                return work(between, chosen)
            except RepairImpossible as refusal:  # of the adapter: the device has not failed
                return refusal

        found = attempt(on_device, check_deadline)
        if isinstance(found, RepairImpossible):
            raise found
        if found is not None:
            return found
    return work(check_deadline)


def repair_facts(found: RepairedAdapter, policy: Policy) -> RepairFacts:
    """What a verdict says of a repair."""
    effect = found.effect
    digest = policy.repair.statistics_digest if policy.repair else None
    return RepairFacts(digest or "", found.strength, effect.residual, effect.kept, effect.lost)


def statistics_of(policy: Policy) -> StatisticsFile | None:
    """The statistics that the policy repairs with; None if it repairs nothing.

    Raises:
        StatisticsInvalid: as `read_statistics`.
    """
    choice = policy.repair
    if choice is None:
        return None
    return loaded_statistics(choice.statistics, choice.statistics_digest or "")


def check_statistics(policy: Policy) -> None:
    """Read the policy's statistics, if it has any, and check who can write them.

    Raises:
        PolicyInvalid: they are not valid, or others than this user and root can write them.
    """
    if policy.mode == "off" or policy.repair is None:
        return
    try:
        check_owner(policy.repair.statistics)
        statistics_of(policy)
    except ValueError as error:
        raise PolicyInvalid(f"repair.statistics: {error}") from None
    except StatisticsInvalid as error:
        raise PolicyInvalid(f"repair.statistics: {error.problem}") from None
