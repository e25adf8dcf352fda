"""The steps of an admission. Each takes what is known and returns more, or raises a refusal."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from s3lora_serve.adapter.changed_weights import ChangedWeights
from s3lora_serve.adapter.local_folder import check_roots
from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import Adapter, read_adapter
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.admission.decision import Outcome, decide, settle
from s3lora_serve.admission.partial import (
    Begun,
    Copied,
    Decided,
    Load,
    Owned,
    Placed,
    Read,
    Scored,
    grown,
)
from s3lora_serve.admission.repairing import repair_of
from s3lora_serve.admission.scoring import alignment_reference, attested_scores, score_adapter
from s3lora_serve.admission.verdict import Decision
from s3lora_serve.alignment.project import projected_weights
from s3lora_serve.errors import FormatNotAllowed, GateFailed
from s3lora_serve.plans.apply import transformed_weights
from s3lora_serve.plans.file import check_fits, find_plan
from s3lora_serve.policy.owners import foreign_load
from s3lora_serve.signatures.vouch import vouch


def run_steps(load: Load, begun: Begun) -> Iterator[Begun]:
    """Do every step; what is known after each."""
    yield (copied := take_copy(load, begun))
    yield (signed := verify_vouchers(load, copied))
    yield (vouched := check_owner(load, signed))
    yield (read := read_copy(load, vouched))
    yield (placed := place(load, read))
    yield (scored := score(load, placed))
    yield (chosen := find_its_plan(load, scored))
    yield (transformed := transform(chosen))
    yield (decided := make_decision(transformed))
    yield (changed := change(load, decided))
    write(load, changed)


def take_copy(load: Load, known: Begun) -> Copied:
    """Take the private copy of the adapter's two files."""
    limits = known.policy.limits
    if "safetensors" not in limits.formats:  # the only format that is read
        raise FormatNotAllowed(f"limits.formats is {list(limits.formats)}: it allows none")
    if load.circumstances.origin is not None:
        check_roots(load.real_path, limits.roots)
        limits = limits.model_copy(update={"roots": ()})
    if isinstance(load.folder, RemoteFolder):
        copy = load.folder.copy(limits)
        # Downloads have their own deadline.
        return grown(Copied, known, copy=copy, deadline=time.perf_counter() + limits.seconds)
    return grown(
        Copied, known, copy=copy_adapter(load.folder, limits, load.into() if load.into else None)
    )


def verify_vouchers(load: Load, known: Copied) -> Copied:
    """Verify signature and attestation, and apply the rules that match the signer."""
    known.check_deadline()
    before = load.circumstances.vouchers
    found = vouch(load.folder, known.copy, known.policy, load.into, known.check_deadline, before)
    signer = found.by.signer
    return replace(
        known,
        vouchers=found.by,
        attestation=found.attestation,
        objection=found.objection,
        policy=known.policy if signer is None else load.policy_for(signer),
    )


def check_owner(load: Load, known: Copied) -> Owned:
    """Check that the name is not another's."""
    who = known.vouchers.signer, load.circumstances.asked_with
    foreign = foreign_load(known.policy.owners, load.name, load.real_path, *who)
    if foreign and known.policy.mode == "enforce":
        raise foreign
    return grown(Owned, known, objection=known.objection or foreign)


def read_copy(_load: Load, known: Owned) -> Read:
    """Read the private copy."""
    policy = known.policy
    adapter = read_adapter(known.copy, policy.limits, policy.on_unscorable, known.check_deadline)
    return grown(Read, known, adapter=adapter)


def place(load: Load, known: Read) -> Placed:
    """Leave out the modules that the served model does not take."""
    left_out = tuple(load.circumstances.left_out_of_model(known.adapter))
    taken = known.adapter.without(left_out)
    return grown(Placed, known, left_out=left_out, taken=taken, read_at=time.perf_counter())


def score(load: Load, known: Placed) -> Scored:
    """Score the selected modules, or take the scores of a trusted attestation."""
    attested = attested_scores(known.adapter, known.policy, known.attestation)
    if attested:
        scores = [each for each in attested if each.name not in known.left_out]
    else:
        scores = score_adapter(known.taken, known.policy, load.device, known.check_deadline)
    return grown(
        Scored,
        known,
        scores=tuple(scores),
        scored_by="attestation" if attested else "gate",
        scored_at=time.perf_counter(),
    )


def find_its_plan(load: Load, known: Scored) -> Scored:
    """Find the adapter's plan, if its scores and digest do not settle the decision."""
    digest, policy = known.copy.digest, known.policy
    facts = known.scores, scalings(known.taken), digest, policy, known.adapter.config.digest
    if settle(*facts) is not None:
        return known
    found = None if policy.plans is None else find_plan(policy.plans, digest)
    return replace(known, plan=load.circumstances.plan or found)


def transform(known: Scored) -> Scored:
    """Compute the weights that the plan makes of the adapter's."""
    if known.plan is None:
        return known
    check_fits(known.plan, known.adapter)
    weights = transformed_weights(known.adapter, known.plan, known.check_deadline)
    return replace(known, weights=weights)


def make_decision(known: Scored) -> Decided:
    """Decide by the plan, or by the scores."""
    facts = known.scores, scalings(known.taken), known.copy.digest, known.policy
    outcome = decide(*facts, known.plan, known.adapter.config.digest)
    if known.objection:
        outcome = Outcome(Decision.REJECTED, known.objection)
    return grown(Decided, known, outcome=outcome)


def change(load: Load, known: Decided) -> Decided:
    """Compute the projected or repaired weights that the decision asks for."""
    outcome, policy = known.outcome, known.policy
    if outcome.projected and (reference := alignment_reference(policy)):
        modules = outcome.projected
        weights = projected_weights(known.taken, reference, modules, known.check_deadline)
        known = replace(known, weights=weights)
    if outcome.repairs:
        base_model = load.circumstances.base_model
        repair = repair_of(known.taken, policy, outcome, base_model, known.check_deadline)
        if repair:
            stripped = replace(outcome, decision=Decision.STRIPPED)
            known = replace(known, outcome=stripped, weights=repair.weights, repair=repair)
    return known


def write(load: Load, known: Decided) -> None:
    """Write the changed weights beside the adapter's own."""
    if known.weights is not None and load.into is not None and load.policy.mode == "enforce":
        _write(known.weights, load.into())


def _write(weights: ChangedWeights, private: Path) -> None:
    try:
        weights.write_into(private)
    except OSError as error:  # of the store's disk: the adapter is not the cause
        raise GateFailed(f"no private copy in {private}: {error.strerror}") from None


def scalings(adapter: Adapter) -> dict[str, float]:
    """The scaling of every module, by name."""
    return {module.name: module.scaling for module in adapter.modules}
