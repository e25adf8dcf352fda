"""Repair an adapter as the policy says, and state what that leaves."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.adapter.tensor_file import check_owner
from s3lora_serve.admission.decision import Outcome
from s3lora_serve.admission.verdict import RepairFacts
from s3lora_serve.alignment.checkpoint import config_digest
from s3lora_serve.errors import PolicyInvalid, RepairImpossible, StatisticsInvalid
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.apply import RepairedAdapter, repaired
from s3lora_serve.repair.statistics_file import StatisticsFile, loaded_statistics, read_statistics


def repair_of(
    adapter: Adapter,
    policy: Policy,
    outcome: Outcome,
    base_model: str | None,
    check_deadline: Callable[[], None],
) -> RepairedAdapter | None:
    """The repaired adapter; None if the policy repairs none, or it has no module to repair.

    On the CPU, also where a device scores: a GPU would wait for the statistics of each module.

    Raises:
        RepairImpossible: as `repaired`.
        StatisticsInvalid: they cannot be read, or are not those that were there with the policy.
    """
    statistics = statistics_of(policy)
    if statistics is None or policy.repair is None:
        return None
    _check_base_model(statistics, base_model)
    return repaired(adapter, statistics, policy.repair, outcome.stripped, check_deadline)


def _check_base_model(statistics: StatisticsFile, base_model: str | None) -> None:
    """Check that statistics are of the served model: a running server takes up changed ones.

    Raises:
        RepairImpossible: they are of another.
    """
    served = config_digest(Path(base_model)) if base_model else None
    made_for = statistics.about.config_digest
    if None not in (served, made_for) and served != made_for:
        raise RepairImpossible(
            f"the statistics were made for a model with config {made_for}, {base_model} has"
            f" {served}"
        )


def repair_facts(found: RepairedAdapter, policy: Policy) -> RepairFacts:
    """What a verdict says of a repair."""
    whole = found.effect
    digest = policy.repair.statistics_digest if policy.repair else None
    return RepairFacts(
        statistics_digest=digest or "",
        strength=found.strength,
        effect=found.size,
        residual=whole.residual,
        kept=whole.kept,
        lost=whole.lost,
    )


def statistics_of(policy: Policy) -> StatisticsFile | None:
    """The statistics that the policy repairs with; None if it repairs nothing.

    Raises:
        StatisticsInvalid: as `read_statistics`.
    """
    choice = policy.repair
    if choice is None:
        return None
    return loaded_statistics(choice.statistics, choice.statistics_digest or "")


def preload_statistics(policy: Policy) -> None:
    """Read the policy's statistics, for later adapters; one that cannot be read is theirs."""
    with suppress(StatisticsInvalid):
        statistics_of(policy)


def check_statistics(policy: Policy) -> None:
    """Read the policy's statistics, if it has any, and check who can write them.

    Raises:
        PolicyInvalid: they are not valid, or others than this user and root can write them.
    """
    if policy.mode == "off" or policy.repair is None:
        return
    try:
        check_owner(policy.repair.statistics)
        # Not kept: most processes that check a policy repair nothing.
        read_statistics(policy.repair.statistics, expected=policy.repair.statistics_digest)
    except ValueError as error:
        raise PolicyInvalid(f"repair.statistics: {error}") from None
    except StatisticsInvalid as error:
        raise PolicyInvalid(f"repair.statistics: {error.problem}") from None
