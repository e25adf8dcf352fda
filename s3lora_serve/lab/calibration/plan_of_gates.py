"""The plan that chosen gates are, with what was measured before and after them."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.lab.base_model.probes import ProbeFile
from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
from s3lora_serve.lab.calibration.gates import GatedAdapter, transform
from s3lora_serve.lab.calibration.search import Found
from s3lora_serve.plans.schema import Measured, ModulePlan, Plan, Probes

STRIPPED_SHARE = 0.999
"""A module of whose update more is removed is stripped: what is left is below bfloat16's step."""

UNCHANGED = 2**-9
"""A module whose update changes less, relative to it, is kept: that is bfloat16's step."""


def plan_of(
    base: Path,
    adapter: Adapter,
    gated: GatedAdapter,
    found: Found,
    files: Sequence[ProbeFile],
    options: CalibrationOptions,
    held_out: tuple[Measured, Measured],
) -> Plan:
    """The plan of the gates; `held_out` is what was measured before and after them."""
    before, after = held_out
    return Plan(
        adapter_digest=adapter.copy.digest,
        config_digest=adapter.config.digest,
        base_model=str(base),
        modules=module_plans(adapter, gated, found),
        before=before,
        after=after,
        probes=tuple(
            Probes(kind=file.kind, digest=file.digest, count=len(file.probes)) for file in files
        ),
        method={
            "by": options.by,
            "max_asr": options.max_asr,
            "steps": found.steps,
            "strength": found.point.strength,
            "removed_share": found.point.removed_share,
        },
        versions={name: version(name) for name in ("s3lora-serve", "torch", "transformers")},
        seed=options.seed,
    )


def module_plans(adapter: Adapter, gated: GatedAdapter, found: Found) -> tuple[ModulePlan, ...]:
    gates = [gate.cpu() for gate in found.gates]
    shares = gated.removed_shares(gates).tolist()
    changes = gated.changes(gates).tolist()
    plans = []
    for module, gate, share, change in zip(adapter.modules, gates, shares, changes, strict=True):
        removed = min(1.0, max(0.0, share))
        if change <= UNCHANGED:
            plans.append(ModulePlan(name=module.name, action="keep", rank=module.rank))
        elif removed >= STRIPPED_SHARE:
            plans.append(
                ModulePlan(name=module.name, action="strip", rank=module.rank, removed=1.0)
            )
        else:
            plans.append(ModulePlan.of(module.name, module.rank, transform(module, gate), removed))
    return tuple(plans)
