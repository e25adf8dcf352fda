"""What each defence makes of an attack's adapter: the folder as it is served, and the verdict."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import s3lora_serve
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.calibration.calibrate import calibrate
from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
from s3lora_serve.plans.schema import Plan, parse_plan
from s3lora_serve.policy.file import with_options
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy
from tests.runs.attacks.attacks import Attacked
from tests.runs.evidence.alignment import SCORERS, alignment_policy
from tests.runs.evidence.base_model import Progress
from tests.runs.evidence.base_statistics import statistics
from tests.runs.evidence.probes import probe_files
from tests.runs.evidence.repair import policy as repairing
from tests.runs.evidence.wheels import CACHE

THRESHOLD = 0.3
"""Relative index from which the second rule of the index strips, as in the threat model."""

Defended = tuple[Path | None, Verdict]
"""The folder as served, None if the adapter is refused; the verdict."""

Defence = Callable[[Attacked, Path, CalibrationBase, Progress], Defended]


def _whole(attacked: Attacked, _base: Path, _calibration: CalibrationBase, _: Progress) -> Defended:
    return attacked.folder, s3lora_serve.scan_adapter(attacked.folder, _permissive(Strip(top_k=0)))


def _index(strip: Strip) -> Defence:
    return lambda attacked, _base, _calibration, _progress: _stripped(
        attacked, _permissive(strip), None
    )


def _aligned(scorer: str) -> Defence:
    def defend(attacked: Attacked, base: Path, _: CalibrationBase, _progress: Progress) -> Defended:
        chosen = with_options(alignment_policy(base), scorer)
        return _stripped(attacked, chosen.model_copy(update={"limits": _SLOW}), None)

    return defend


def _repaired(attacked: Attacked, base: Path, _: CalibrationBase, progress: Progress) -> Defended:
    return _stripped(attacked, repairing(statistics(base, None, progress)), None)


def _planned(
    attacked: Attacked, _base: Path, calibration: CalibrationBase, progress: Progress
) -> Defended:
    """A plan calibrated with the operator's ordinary probes, also if it misses the goal."""
    plan, _ = _plan(attacked, calibration, progress)
    return _stripped(attacked, _permissive(Strip(top_k=0)), plan)


def _fleet(
    attacked: Attacked, base: Path, calibration: CalibrationBase, progress: Progress
) -> Defended:
    """A server that repairs, with plans of `s3lora planner`, which writes none that misses."""
    plan, reached = _plan(attacked, calibration, progress)
    policy = repairing(statistics(base, None, progress))
    return _stripped(attacked, policy, plan if reached else None)


def _plan(
    attacked: Attacked, calibration: CalibrationBase, progress: Progress
) -> tuple[Plan, bool]:
    """The plan, and whether it reaches the goal."""
    file = CACHE / "attack-plans" / f"{attacked.folder.name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        files = [read_probes(path, kind) for kind, path in probe_files("tool calls").items()]
        found = calibrate(
            calibration,
            attacked.folder,
            files,
            CalibrationOptions(seed=attacked.seed),
            progress=lambda phase, done, total, note="": progress(
                f"{attacked}: {phase} {note}", done, total
            ),
        )
        said = {"reached": found.reached, "plan": found.plan.as_json()}
        file.write_text(json.dumps(said))
    said = json.loads(file.read_text())
    return parse_plan(said["plan"], str(file)), said["reached"]


DEFENCES: dict[str, Defence] = {
    "none": _whole,
    "index, top 10": _index(Strip(top_k=10)),
    f"index, over {THRESHOLD:g}": _index(Strip(threshold=THRESHOLD)),
    **{name: _aligned(scorer) for name, scorer in SCORERS.items()},
    "repair": _repaired,
    "plan": _planned,
    "plans and repair": _fleet,
}

_SLOW = Limits(seconds=3600, max_stripped_fraction=1.0)


def _permissive(strip: Strip) -> Policy:
    return Policy(strip=strip, on_uninformative="admit", limits=_SLOW)


def _stripped(attacked: Attacked, policy: Policy, plan: Plan | None) -> Defended:
    target = CACHE / "defended" / attacked.folder.name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    verdict = s3lora_serve.strip_adapter(attacked.folder, target, policy, plan=plan)
    return (target if target.exists() else None), verdict
