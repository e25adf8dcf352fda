"""The verdict: the frozen record of one decision, with the policy and scorer used for it."""

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal

from s3lora_serve.errors import GateFailed, Reason, Refused
from s3lora_serve.policy.schema import Policy
from s3lora_serve.printable import printable
from s3lora_serve.signatures.records import Attester, Signer, Vouchers


class Decision(StrEnum):
    """What enforce does with the adapter (audit only says it)."""

    ADMITTED = "admitted"
    STRIPPED = "stripped"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class ModuleVerdict:
    """One module: its score, and whether its update is taken away or changed."""

    name: str
    layer: int | None
    projection: str
    shape: tuple[int, int]  # (m, n) of ΔW
    rank: int
    ssi: float | None  # None: ΔW = 0, or the policy does not select the module
    relative_ssi: float | None
    spectrum: tuple[float, ...]
    row_norm_mean: float | None
    column_norm_mean: float | None
    stripped: bool
    energy_share: float | None = None  # ‖ΔW‖_F² over the sum of all scored modules
    negligible: bool = False  # too small to be counted by the strip rule
    transformed: bool = False  # served with B' = B·T of a plan
    removed_share: float = 0.0  # of ‖ΔW‖_F²: 1 if stripped, < 0 if projecting makes ΔW larger
    projected: bool = False  # served with B' = C·B of the alignment reference
    repaired: bool = False  # served with the repair's B' and A'
    residual: float | None = None  # share of its effect on refusals that is left
    kept: float | None = None  # share of its effect on benign inputs that is left
    alignment: float | None = None  # score of safe-lora or splora; None: another scorer, or ΔW = 0
    captured: float | None = None  # share of the alignment's energy that the reference holds

    @property
    def strip_order(self) -> float | None:
        """What modules are ranked by, the highest first: minus the alignment, or relative SSI."""
        return self.relative_ssi if self.alignment is None else -self.alignment

    @property
    def changed(self) -> bool:
        """Whether the module is served otherwise than its adapter has it."""
        return self.stripped or self.transformed or self.projected or self.repaired


@dataclass(frozen=True, slots=True)
class RepairFacts:
    """How an adapter was repaired, and what that leaves of its whole effect."""

    statistics_digest: str
    strength: float  # λ: the larger, the more is kept
    effect: float  # on refusals, of what is left, against what the base model's weights put out
    residual: float  # share of the effect on refusals that is left
    kept: float  # at least this share of the effect on benign inputs is left
    lost: float  # how far the effect on benign inputs moved, relative to it


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of one decision went."""

    read: float = 0.0
    score: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on one adapter. What was never learnt (unreadable files) is None."""

    path: str
    name: str
    digest: str | None  # sha256 of adapter_model.safetensors in the adapter folder
    config_digest: str | None  # sha256 of the canonical JSON of adapter_config.json
    decision: Decision
    reason: Reason | None
    uninformative: bool
    mode: str
    scorer: dict[str, Any]
    policy_digest: str
    modules: tuple[ModuleVerdict, ...] = ()
    removed: tuple[str, ...] = ()  # unscorable tensors that are removed (policy: strip)
    unscored: tuple[str, ...] = ()  # unscorable tensors that are served unscored (policy: admit)
    left_out: tuple[str, ...] = ()  # modules and tensors that the served model does not take
    seconds: Seconds = field(default_factory=Seconds)
    selected_by: Literal["plan", "repair", "index"] = "index"  # what chose the changed modules
    plan_digest: str | None = None  # of the plan that was read, also where it is refused
    served_digest: str | None = None  # sha256 of the weights file as served; None: not served
    signed_by: Signer | None = None  # of the policy's signers; None: of none
    attested_by: Attester | None = None  # of the policy's keys for attestations; None: of none
    scored_by: Literal["gate", "attestation"] = "gate"  # where the scores are from
    config_file_digest: str | None = None  # sha256 of adapter_config.json, byte for byte
    repair: RepairFacts | None = None  # None: not repaired
    # Log-odds of refusals that it took away before repair, to first order, for each percent that it
    # moves outputs on benign inputs. None: no statistics say so.
    suspicion: float | None = None

    @property
    def refusal(self) -> Refused:
        """What to raise for a verdict that refuses."""
        return Refused(self.reason or Reason.of(GateFailed("the verdict gives no reason")))

    @property
    def vouchers(self) -> Vouchers:
        """Who vouched for the adapter."""
        return Vouchers(self.signed_by, self.attested_by)

    @property
    def by_alignment(self) -> bool:
        """Whether modules are ranked by an alignment reference and not by their sharpness."""
        return any(module.captured is not None for module in self.modules)

    @property
    def transformed(self) -> tuple[str, ...]:
        """PEFT names of the modules that a plan transforms."""
        return tuple(module.name for module in self.modules if module.transformed)

    @property
    def projected(self) -> tuple[str, ...]:
        """PEFT names of the projected modules."""
        return tuple(module.name for module in self.modules if module.projected)

    @property
    def repaired(self) -> tuple[str, ...]:
        """PEFT names of the repaired modules."""
        return tuple(module.name for module in self.modules if module.repaired)

    @property
    def stripped(self) -> tuple[str, ...]:
        """PEFT names of the stripped modules."""
        return tuple(module.name for module in self.modules if module.stripped)

    def without_spectra(self) -> "Verdict":
        """The verdict as a server keeps it: no spectra, and names shared with other verdicts."""
        return replace(self, modules=tuple(map(_compact, self.modules)))

    def as_json(self, *, spectra: bool = True) -> dict[str, Any]:
        """The verdict as JSON values. Its keys are part of the product's contract.

        `spectra=False` omits the spectra, which are most of its bytes.
        """
        return {
            "path": self.path,
            "name": self.name,
            "digest": self.digest,
            "config_digest": self.config_digest,
            "decision": self.decision.value,
            "reason": self.reason and {"code": self.reason.code, "message": self.reason.message},
            "uninformative": self.uninformative,
            "mode": self.mode,
            "scorer": self.scorer,
            "policy_digest": self.policy_digest,
            "modules": [_module_json(module, spectra) for module in self.modules],
            "removed": list(self.removed),
            "unscored": list(self.unscored),
            "left_out": list(self.left_out),
            "seconds": {
                "read": self.seconds.read,
                "score": self.seconds.score,
                "total": self.seconds.total,
            },
            "selected_by": self.selected_by,
            "plan_digest": self.plan_digest,
            "served_digest": self.served_digest,
            "signed_by": self.signed_by and asdict(self.signed_by),
            "attested_by": self.attested_by and asdict(self.attested_by),
            "scored_by": self.scored_by,
            "config_file_digest": self.config_file_digest,
            "repair": self.repair and asdict(self.repair),
            "suspicion": self.suspicion,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Verdict":
        """The verdict from the output of `as_json`.

        Raises:
            KeyError, TypeError, ValueError: `data` was not written by `as_json`.
        """
        return cls(
            **data
            | {
                "decision": Decision(data["decision"]),
                "reason": Reason.from_json(data["reason"]),
                "modules": tuple(_module_from_json(module) for module in data["modules"]),
                "removed": tuple(data["removed"]),
                "unscored": tuple(data["unscored"]),
                "left_out": tuple(data.get("left_out", ())),
                "seconds": Seconds(**data["seconds"]),
                "signed_by": Signer(**signed) if (signed := data.get("signed_by")) else None,
                "attested_by": Attester(**key) if (key := data.get("attested_by")) else None,
                "repair": RepairFacts(**facts) if (facts := data.get("repair")) else None,
            }
        )


def is_refused(verdict: Verdict) -> bool:
    """Whether the adapter may not be served. Audit mode serves what it would reject."""
    return verdict.decision is Decision.REJECTED and verdict.mode == "enforce"


def served_stripped_count(verdict: Verdict) -> int:
    """The number of modules stripped while the adapter is served; 0 in audit mode."""
    return len(verdict.stripped) if verdict.mode == "enforce" else 0


def differs(before: Verdict, after: Verdict) -> bool:
    """Whether two verdicts on one adapter serve other weights, obey other plans, or refuse it."""
    return _outcome(before) != _outcome(after)


def _outcome(verdict: Verdict) -> tuple[object, ...]:
    reason = verdict.reason and verdict.reason.code
    parts = verdict.stripped, verdict.transformed, verdict.projected, verdict.repaired
    changed = tuple(map(frozenset, parts))
    plan = verdict.plan_digest, verdict.served_digest
    unserved = verdict.removed, verdict.unscored, verdict.left_out
    return verdict.decision, verdict.mode, reason, changed, unserved, plan


_UNCHANGED: dict[str, Any] = {
    "stripped": False, "transformed": False, "projected": False, "removed_share": 0.0,
    "repaired": False, "residual": None, "kept": None,
}  # fmt: skip


def with_rejection(verdict: Verdict, reason: Reason) -> Verdict:
    """The verdict, rejected after its decision. No module counts as changed."""
    kept = tuple(replace(module, **_UNCHANGED) for module in verdict.modules)
    rejected = replace(verdict, decision=Decision.REJECTED, reason=reason, modules=kept)
    return replace(rejected, served_digest=None, repair=None)


def unread_verdict(name: str, path: str, policy: Policy) -> Verdict:
    """The verdict on an adapter that could not be read, without a reason yet."""
    return Verdict(
        path=printable(path),
        name=printable(name),
        digest=None,
        config_digest=None,
        decision=Decision.REJECTED,
        reason=None,
        uninformative=False,
        mode=policy.mode,
        scorer=policy.scorer.as_json(),
        policy_digest=policy.digest,
    )


def _compact(module: ModuleVerdict) -> ModuleVerdict:
    return replace(
        module,
        name=sys.intern(module.name),
        projection=sys.intern(module.projection),
        shape=_shared_shape(*module.shape),
        spectrum=(),
    )


@lru_cache(maxsize=1024)
def _shared_shape(m: int, n: int) -> tuple[int, int]:
    return m, n


def _module_from_json(data: dict[str, Any]) -> ModuleVerdict:
    m, n = data["shape"]
    return ModuleVerdict(**data | {"shape": (m, n), "spectrum": tuple(data["spectrum"])})


_MODULE_FIELDS = tuple(each.name for each in fields(ModuleVerdict))
"""A module's JSON has the fields of `ModuleVerdict`, in their order."""


def _module_json(module: ModuleVerdict, spectra: bool) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in _MODULE_FIELDS}
    values["shape"] = list(module.shape)
    if spectra:
        values["spectrum"] = list(module.spectrum)
    else:
        del values["spectrum"]
    return values
