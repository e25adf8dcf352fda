"""The admission of every adapter: private copy, read, score, decide by plan or index, verdict."""

import hashlib
import os
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from s3lora_serve.adapter.changed_weights import ChangedWeights
from s3lora_serve.adapter.local_folder import LocalFolder, check_roots
from s3lora_serve.adapter.private_copy import PrivateCopy, copy_adapter
from s3lora_serve.adapter.reader import Adapter, read_adapter
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.admission.decision import Outcome, decide, settle
from s3lora_serve.admission.module_verdicts import module_verdicts
from s3lora_serve.admission.repairing import repair_facts, repair_of
from s3lora_serve.admission.scoring import (
    alignment_reference,
    attested_scores,
    score_adapter,
)
from s3lora_serve.admission.verdict import (
    Decision,
    Seconds,
    Verdict,
    unread_verdict,
    with_rejection,
)
from s3lora_serve.alignment.project import projected_weights
from s3lora_serve.errors import (
    AdapterRejected,
    DeadlinePassed,
    GateFailed,
    Reason,
    TooLong,
)
from s3lora_serve.plans.apply import transformed_weights
from s3lora_serve.plans.file import check_fits, find_plan
from s3lora_serve.plans.schema import Plan
from s3lora_serve.policy.lengths import MAX_NAME, MAX_PATH
from s3lora_serve.policy.owners import foreign_load
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.apply import RepairedAdapter
from s3lora_serve.signatures.records import Vouchers
from s3lora_serve.signatures.vouch import Vouched, vouch
from s3lora_serve.spectral import ModuleScore


@dataclass(frozen=True, slots=True)
class Admission:
    """A verdict, with the adapter it is about (None if it could not be read) and its scores."""

    verdict: Verdict
    adapter: Adapter | None
    scores: tuple[ModuleScore, ...] = ()
    weights: ChangedWeights | None = None  # what a plan or a projection makes of its file

    def under(self, policy: Policy) -> Verdict:
        """The verdict of the index on the same scores under another policy, without any plan."""
        if self.adapter is None or not self.scores or not self.verdict.digest:
            return self.verdict
        policy = policy.model_copy(update={"require_plan": False})
        facts = (self.scores, _scalings(self.adapter), self.verdict.digest, policy)
        outcome = decide(*facts, config_digest=self.adapter.config.digest)
        return replace(
            self.verdict,
            decision=outcome.decision,
            reason=Reason.of(outcome.refusal) if outcome.refusal else None,
            uninformative=outcome.uninformative,
            policy_digest=policy.digest,
            modules=module_verdicts(self.adapter, self.scores, outcome, policy),
            selected_by="index",
            plan_digest=None,
            repair=None,
            served_digest=_served_digest(self.adapter.copy, None, outcome, self.verdict.mode),
        )


def admit(
    folder: Path | LocalFolder | RemoteFolder,
    name: str,
    policy: Policy,
    *,
    base_model: str | None = None,
    device: str = "auto",
    into: Callable[[], Path] | None = None,
    left_out_of_model: Callable[[Adapter], Collection[str]] = lambda _: (),
    origin: Path | None = None,
    plan: Plan | None = None,
    vouchers: Vouchers | None = None,
    asked_with: str | None = None,
) -> Admission:
    """Take a private copy of an adapter and decide on it. A bad adapter gets a rejected verdict.

    Args:
        folder: the adapter's folder; one that the caller has opened stays open.
        name: the adapter's name, which the policy's rules match.
        policy: the server's policy; its rules are applied here.
        base_model: the served model, which the policy's rules match.
        device: where modules are scored.
        into: creates the folder for the private copy; None keeps the copy in memory.
        left_out_of_model: the modules that the served model does not take, which decide nothing;
            raises what refuses an adapter of another model, before it is scored.
        origin: the folder that rules match and the verdict names, if it is not `folder`.
        plan: the adapter's plan, in the place of one in the policy's folder of plans.
        vouchers: who vouched for the adapter when it was admitted, for a look at a stored copy.
            None: the folder's signature and attestation are verified.
        asked_with: the digest of the API key that asks, "" for a client without a key; None: the
            operator asks. The owners of names may list keys.
    """
    started = time.perf_counter()
    resources = ExitStack()
    opened = resources.enter_context(LocalFolder(folder)) if isinstance(folder, Path) else folder
    real_path = opened.real_path if origin is None else _real_path(origin)
    try:
        effective = policy.for_adapter(name, real_path, base_model)
    except TooLong as refusal:
        resources.close()
        unread = unread_verdict(name[:MAX_NAME], str(origin or folder)[:MAX_PATH], policy)
        return Admission(with_rejection(unread, Reason.of(refusal)), None)
    deadline = started + effective.limits.seconds
    copy: PrivateCopy | None = None
    adapter: Adapter | None = None
    taken: Adapter | None = None  # without the modules that the served model leaves out
    left_out: Collection[str] = ()
    scores: list[ModuleScore] = []
    used: Plan | None = None
    vouched = Vouched()
    attested: list[ModuleScore] | None = None
    weights: ChangedWeights | None = None
    repair: RepairedAdapter | None = None
    read = scored = started
    try:
        limits = effective.limits
        if origin is not None:
            check_roots(real_path, limits.roots)
            limits = limits.model_copy(update={"roots": ()})
        if isinstance(opened, RemoteFolder):
            copy = opened.copy(limits)
            deadline = time.perf_counter() + limits.seconds  # downloads have their own deadline
        else:
            copy = copy_adapter(opened, limits, into() if into else None)
        check_deadline = partial(_check_deadline, deadline, effective)
        check_deadline()
        vouched = vouch(opened, copy, effective, into, check_deadline, vouchers)
        signer = vouched.by.signer
        if signer is not None:
            effective = policy.for_adapter(name, real_path, base_model, signer)
        foreign = foreign_load(effective.owners, name, real_path, signer, asked_with)
        if foreign and effective.mode == "enforce":
            raise foreign
        adapter = read_adapter(copy, effective.limits, effective.on_unscorable, check_deadline)
        left_out = left_out_of_model(adapter)
        taken = adapter.without(left_out)
        read = time.perf_counter()
        attested = attested_scores(adapter, effective, vouched.attestation)
        scores = (
            [score for score in attested if score.name not in left_out]
            if attested
            else score_adapter(taken, effective, device, check_deadline)
        )
        scored = time.perf_counter()
        facts = (scores, _scalings(taken), copy.digest, effective)
        config = adapter.config.digest
        if settle(*facts, config) is None and (
            used := plan or _plan_in_folder(effective, copy.digest)
        ):
            check_fits(used, adapter)
            weights = transformed_weights(adapter, used, check_deadline)
        outcome = decide(*facts, used, config)
        if objection := vouched.objection or foreign:
            outcome = Outcome(Decision.REJECTED, objection)
        if outcome.projected and (reference := alignment_reference(effective)):
            weights = projected_weights(taken, reference, outcome.projected, check_deadline)
        if outcome.repairs and (
            repair := repair_of(taken, effective, outcome, base_model, check_deadline)
        ):
            outcome = replace(outcome, decision=Decision.STRIPPED)
            weights = repair.weights
        if weights is not None and into is not None and policy.mode == "enforce":
            _write(weights, into())
    except AdapterRejected as refusal:
        outcome = Outcome(Decision.REJECTED, refusal)
    except Exception as error:  # noqa: BLE001 - fail closed: nothing unscored is admitted
        outcome = Outcome(Decision.REJECTED, GateFailed(f"{type(error).__name__}: {error}"))
    finally:
        resources.close()
    if outcome.decision is Decision.REJECTED:
        weights = repair = None
    served = _served_digest(copy, weights, outcome, policy.mode) if scores else None
    ended = time.perf_counter()
    unscorable = adapter.unscorable if adapter else ()
    verdict = Verdict(
        path=str(origin or folder),
        name=name,
        digest=copy.digest if copy else None,
        config_digest=adapter.config.digest if adapter else None,
        decision=outcome.decision,
        reason=Reason.of(outcome.refusal) if outcome.refusal else None,
        uninformative=outcome.uninformative,
        mode=policy.mode,
        scorer=effective.scorer.as_json(),
        policy_digest=policy.digest,
        modules=module_verdicts(taken, scores, outcome, effective, repair)
        if taken and scores
        else (),
        removed=unscorable if effective.on_unscorable == "strip" else (),
        unscored=unscorable if effective.on_unscorable == "admit" else (),
        left_out=(*left_out, *adapter.ignored) if adapter else (),
        seconds=Seconds(max(read - started, 0), max(scored - read, 0), ended - started),
        selected_by="plan" if used else "repair" if repair else "index",
        plan_digest=used.digest if used else None,
        served_digest=served,
        signed_by=vouched.by.signed_by,
        attested_by=vouched.by.attested_by,
        scored_by="attestation" if attested else "gate",
        config_file_digest=_sha256(copy.config) if copy else None,
        repair=repair_facts(repair, effective) if repair else None,
    )
    return Admission(verdict, taken, tuple(scores), weights)


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _plan_in_folder(policy: Policy, digest: str) -> Plan | None:
    return None if policy.plans is None else find_plan(policy.plans, digest)


def _write(weights: ChangedWeights, private: Path) -> None:
    try:
        weights.write_into(private)
    except OSError as error:  # of the store's disk: the adapter is not the cause
        raise GateFailed(f"no private copy in {private}: {error.strerror}") from None


def _served_digest(
    copy: PrivateCopy | None, weights: ChangedWeights | None, outcome: Outcome, mode: str
) -> str | None:
    """sha256 of the weights file that is served; None if nothing is."""
    if copy is None or (outcome.decision is Decision.REJECTED and mode == "enforce"):
        return None
    return weights.digest() if weights is not None and mode == "enforce" else copy.digest


def _scalings(adapter: Adapter) -> dict[str, float]:
    return {module.name: module.scaling for module in adapter.modules}


def _real_path(folder: Path) -> str:
    """The path without links and dots, which the policy's rules match."""
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):  # a null byte: taking the private copy reports the error
        return str(folder)


def _check_deadline(deadline: float, policy: Policy) -> None:
    if time.perf_counter() > deadline:
        raise DeadlinePassed(f"reading and scoring took over {policy.limits.seconds:g} s")
