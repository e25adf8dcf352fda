"""What is known of an adapter after each step of its admission, and the verdict on it."""

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from s3lora_serve.adapter.changed_weights import ChangedWeights
from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.private_copy import PrivateCopy
from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.admission.decision import Outcome
from s3lora_serve.admission.module_verdicts import module_verdicts
from s3lora_serve.admission.repairing import repair_facts
from s3lora_serve.admission.verdict import Decision, Seconds, Verdict
from s3lora_serve.errors import AdapterRejected, DeadlinePassed, Reason
from s3lora_serve.plans.schema import Plan
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.apply import RepairedAdapter
from s3lora_serve.signatures.attestation import Attestation
from s3lora_serve.signatures.records import Vouchers
from s3lora_serve.spectral import ModuleScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What an admission knows of a load beside the adapter and the policy."""

    base_model: str | None = None  # the served model, which the policy's rules match
    # The modules that the served model does not take, which decide nothing. It raises what refuses
    # an adapter of another model, before that is scored.
    left_out_of_model: Callable[[Adapter], Collection[str]] = lambda _: ()
    origin: Path | None = None  # what rules match and the verdict names, if not the folder itself
    plan: Plan | None = None  # in the place of one in the policy's folder of plans
    # Who vouched for the adapter when it was admitted, for a look at a stored copy. None: the
    # folder's signature and attestation are verified.
    vouchers: Vouchers | None = None
    # The digest of the API key that asks, "" for a client without a key; None: the operator asks.
    asked_with: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """One load of an adapter: what every step of its admission needs."""

    given: Path | LocalFolder | RemoteFolder  # as it was asked for
    folder: LocalFolder | RemoteFolder
    real_path: str  # without links and dots, which the policy's rules match
    name: str
    policy: Policy  # the server's; each step has that of the rules which match
    device: str
    into: Callable[[], Path] | None
    circumstances: Circumstances

    def policy_for(self, signer: str | None = None) -> Policy:
        """The policy with the rules that match.

        Raises:
            TooLong: the name or the path is longer than a rule may match.
        """
        base_model = self.circumstances.base_model
        return self.policy.for_adapter(self.name, self.real_path, base_model, signer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Nothing is read yet. Later steps know more, and have it under these names."""

    policy: Policy  # rules applied
    started: float
    deadline: float
    copy: PrivateCopy | None = None
    vouchers: Vouchers = field(default_factory=Vouchers)
    attestation: Attestation | None = None  # a trusted one
    objection: AdapterRejected | None = None  # in audit mode: for what enforce refuses it
    adapter: Adapter | None = None
    taken: Adapter | None = None  # without the modules that the served model leaves out
    left_out: tuple[str, ...] = ()
    read_at: float = 0.0
    scores: tuple[ModuleScore, ...] = ()
    scored_by: Literal["gate", "attestation"] = "gate"
    scored_at: float = 0.0
    plan: Plan | None = None
    outcome: Outcome | None = None
    weights: ChangedWeights | None = None
    repair: RepairedAdapter | None = None

    def check_deadline(self) -> None:
        """Check that there is time left.

        Raises:
            DeadlinePassed: there is none.
        """
        if time.perf_counter() > self.deadline:
            seconds = self.policy.limits.seconds
            raise DeadlinePassed(f"reading and scoring took over {seconds:g} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied(Begun):
    """The private copy is taken."""

    copy: PrivateCopy


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned(Copied):
    """It is known who vouches for the adapter, and whether its name is the asker's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Owned):
    """The adapter is read and well-formed."""

    adapter: Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed(Read):
    """It is known what the served model takes of it."""

    taken: Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Placed):
    """The modules that the policy selects have scores, and the plan is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided(Scored):
    """The decision is made, and what is served is computed."""

    outcome: Outcome


P = TypeVar("P", bound=Begun)


def grown(partial: type[P], before: Begun, **more: Any) -> P:
    """What was known before a step and what it found, as what is known after it."""
    known = {each.name: getattr(before, each.name) for each in fields(before)}
    return partial(**known | more)


def verdict_of(load: Load, known: Begun, outcome: Outcome) -> Verdict:
    """The verdict of an outcome, from whatever is known when it is made."""
    ended, policy = time.perf_counter(), known.policy
    adapter, taken, copy, by = known.adapter, known.taken, known.copy, known.vouchers
    unscorable = adapter.unscorable if adapter else ()
    rejected = outcome.decision is Decision.REJECTED
    repair = None if rejected else known.repair
    weights = None if rejected else known.weights
    return Verdict(
        path=str(load.circumstances.origin or load.given),
        name=load.name,
        digest=copy.digest if copy else None,
        config_digest=adapter.config.digest if adapter else None,
        decision=outcome.decision,
        reason=Reason.of(outcome.refusal) if outcome.refusal else None,
        uninformative=outcome.uninformative,
        mode=load.policy.mode,
        scorer=policy.scorer.as_json(),
        policy_digest=load.policy.digest,
        modules=module_verdicts(taken, known.scores, outcome, policy, repair)
        if taken and known.scores
        else (),
        removed=unscorable if policy.on_unscorable == "strip" else (),
        unscored=unscorable if policy.on_unscorable == "admit" else (),
        left_out=(*known.left_out, *adapter.ignored) if adapter else (),
        seconds=_seconds(known, ended),
        # A plan that keeps every module whole leaves the adapter to repair.
        selected_by="repair" if repair else "plan" if known.plan else "index",
        plan_digest=known.plan.digest if known.plan else None,
        served_digest=served_digest(copy, weights, outcome, load.policy.mode)
        if known.scores
        else None,
        signed_by=by.signed_by,
        attested_by=by.attested_by,
        scored_by=known.scored_by,
        config_file_digest=_sha256(copy.config) if copy else None,
        repair=repair_facts(repair, policy) if repair else None,
        suspicion=repair.suspicion if repair else None,
    )


def served_digest(
    copy: PrivateCopy | None, weights: ChangedWeights | None, outcome: Outcome, mode: str
) -> str | None:
    """sha256 of the weights file that is served; None if nothing is."""
    if copy is None or (outcome.decision is Decision.REJECTED and mode == "enforce"):
        return None
    return weights.digest() if weights is not None and mode == "enforce" else copy.digest


def _seconds(known: Begun, ended: float) -> Seconds:
    read = known.read_at or known.started
    scored = known.scored_at or known.started
    return Seconds(read - known.started, max(scored - read, 0), ended - known.started)


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
