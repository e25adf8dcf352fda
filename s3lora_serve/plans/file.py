"""Find the plan for an adapter, read it strictly, and check that it is that adapter's."""

import json
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.errors import PlanInvalid
from s3lora_serve.plans.folder import file_bytes, plan_bytes, plan_name
from s3lora_serve.plans.schema import Plan, parse_plan


def find_plan(folder: Path, digest: str) -> Plan | None:
    """The plan in a folder for the weights with this digest; None if there is none.

    Raises:
        PlanInvalid: the folder or the plan is not as the reference says.
    """
    text = plan_bytes(folder, digest)
    return None if text is None else plan_of(text, str(folder / plan_name(digest)))


def read_plan(file: Path) -> Plan:
    """The plan in a file that the operator names, whoever owns it.

    Raises:
        PlanInvalid: it is not a plan.
        OSError: the file cannot be read.
    """
    return plan_of(file_bytes(file), str(file))


def plan_of(text: bytes | bytearray, source: str) -> Plan:
    """The plan in these bytes; `source` names them in errors.

    Raises:
        PlanInvalid: they are not JSON, give a key twice, or break the schema.
    """
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise PlanInvalid(f"{source}: not JSON: {error}") from None
    return parse_plan(data, source)


def check_fits(plan: Plan, adapter: Adapter) -> None:
    """Check that a plan is for this adapter.

    Raises:
        PlanInvalid: digests, module names or ranks are not the adapter's.
    """
    for what, planned, own in (
        ("adapter_digest", plan.adapter_digest, adapter.copy.digest),
        ("config_digest", plan.config_digest, adapter.config.digest),
    ):
        if planned != own:
            raise PlanInvalid(f"the plan's {what} is {planned}, the adapter's {own}")
    ranks = {module.name: module.rank for module in adapter.modules}
    planned_names = {module.name for module in plan.modules}
    if surplus := planned_names - ranks.keys():
        raise PlanInvalid(f"the plan names {min(surplus)}, which the adapter does not have")
    if lacking := ranks.keys() - planned_names:
        raise PlanInvalid(f"the plan lacks {min(lacking)}, a module of the adapter")
    for module in plan.modules:
        if module.rank != ranks[module.name]:
            raise PlanInvalid(
                f"the plan gives {module.name} rank {module.rank}, it has {ranks[module.name]}"
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is given twice")
    return fields
