"""The admission of every adapter: private copy, read, score, decide by plan or index, verdict."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from s3lora_serve.adapter.changed_weights import ChangedWeights
from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.admission.decision import Outcome, decide
from s3lora_serve.admission.module_verdicts import module_verdicts
from s3lora_serve.admission.partial import Begun, Circumstances, Load, served_digest, verdict_of
from s3lora_serve.admission.steps import run_steps, scalings
from s3lora_serve.admission.verdict import Decision, Verdict, unread_verdict, with_rejection
from s3lora_serve.errors import AdapterRejected, GateFailed, Reason, TooLong
from s3lora_serve.policy.lengths import MAX_NAME, MAX_PATH
from s3lora_serve.policy.schema import Policy
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
        facts = (self.scores, scalings(self.adapter), self.verdict.digest, policy)
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
            suspicion=None,
            served_digest=served_digest(self.adapter.copy, None, outcome, self.verdict.mode),
        )


def admit(
    folder: Path | LocalFolder | RemoteFolder,
    name: str,
    policy: Policy,
    *,
    device: str = "auto",
    into: Callable[[], Path] | None = None,
    circumstances: Circumstances | None = None,
) -> Admission:
    """Take a private copy of an adapter and decide on it. A bad adapter gets a rejected verdict.

    Args:
        folder: the adapter's folder; one that the caller has opened stays open.
        name: the adapter's name, which the policy's rules match.
        policy: the server's policy; its rules are applied here.
        device: where modules are scored.
        into: creates the folder for the private copy; None keeps the copy in memory.
        circumstances: what else is known of the load.
    """
    started = time.perf_counter()
    about = circumstances or Circumstances()
    with ExitStack() as resources:
        opened = (
            resources.enter_context(LocalFolder(folder)) if isinstance(folder, Path) else folder
        )
        real_path = opened.real_path if about.origin is None else _real_path(about.origin)
        load = Load(folder, opened, real_path, name, policy, device, into, about)
        try:
            effective = load.policy_for()
        except TooLong as refusal:
            path = str(about.origin or folder)[:MAX_PATH]
            unread = unread_verdict(name[:MAX_NAME], path, policy)
            return Admission(with_rejection(unread, Reason.of(refusal)), None)
        deadline = started + effective.limits.seconds
        return _admission(load, Begun(policy=effective, started=started, deadline=deadline))


def _admission(load: Load, known: Begun) -> Admission:
    """Do the steps; one that refuses ends them, and what was known before it is told."""
    refusal: AdapterRejected | None = None
    try:
        for after in run_steps(load, known):
            known = after
    except AdapterRejected as rejected:
        refusal = rejected
    except Exception as error:  # noqa: BLE001 - fail closed: nothing unscored is admitted
        refusal = GateFailed(f"{type(error).__name__}: {error}")
    outcome = Outcome(Decision.REJECTED, refusal) if refusal else known.outcome
    if outcome is None:
        outcome = Outcome(Decision.REJECTED, GateFailed("the decision was not made"))
    verdict = verdict_of(load, known, outcome)
    weights = None if outcome.decision is Decision.REJECTED else known.weights
    return Admission(verdict, known.taken, known.scores, weights)


def _real_path(folder: Path) -> str:
    """The path without links and dots, which the policy's rules match."""
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):  # a null byte: taking the private copy reports the error
        return str(folder)
