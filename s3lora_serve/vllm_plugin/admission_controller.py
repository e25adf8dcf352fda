"""Decisions of one process: by its policy, on stored copies that it may load.

The API server, `LLM.generate` and the workers each have an admission controller.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.admission.verdict import Verdict, is_refused, with_rejection
from s3lora_serve.errors import (
    AdapterRejected,
    PolicyInvalid,
    Reason,
    S3LoRAError,
    StoreDamaged,
)
from s3lora_serve.plans.schema import Plan
from s3lora_serve.policy.experiment import ExperimentSettings, check_name, experiment_policy
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.schema import Policy
from s3lora_serve.policy.text import check_text
from s3lora_serve.store.stored_copy import open_stored_copy, own_folder
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.model_modules import ModelModules


@dataclass(frozen=True, slots=True)
class Experiment:
    """A registration with settings of its own."""

    settings: ExperimentSettings
    plan: Plan | None = None


class AdmissionController:
    """Decides on adapters in one process and stores the copies that may be loaded."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process

    def learn_model(self, ranks: Iterable[Mapping[str, Any]]) -> ModelModules:
        """The model's LoRA modules, from each worker's `s3lora_model` answer.

        Metrics get their closed label sets from the same answers.
        """
        answers = list(ranks)
        self._process.events.metrics.set_model_modules(
            {tuple(place) for rank in answers for place in rank["places"]}
        )
        return ModelModules.of_workers(answers)

    def admit(
        self,
        folder: Path,
        name: str,
        base_model: str | None,
        modules: ModelModules,
        *,
        store_refused: bool,
        experiment: Experiment | None = None,
        asked_with: str | None = None,
    ) -> tuple[Verdict, Path | None]:
        """The verdict on an adapter, and the path of its stored copy, pinned.

        Without `store_refused` the path of a refused adapter is None. An experiment has settings
        of its own, as far as the policy allows them. `asked_with` is the requester's API key, as
        in `Circumstances`.

        Raises:
            TooLong: name or path are longer than any may be.
            NotText: name or path are no text.
            ExperimentClosed, NameReserved: see `policy/experiment.py`.
            AuditFailed: the policy requires an audit log, and it cannot be written.
            GateFailed, StoreFull: the store cannot take the copy.
        """
        check_lengths(name, str(folder))
        check_text(name, str(folder))
        policy = self._process.reload_policy()
        self._process.events.require_audit(policy)
        with LocalFolder(folder) as opened, self._process.store.new_private_folder() as private:
            policy = _policy_for(policy, name, opened.real_path, base_model, experiment)
            verdict = admit(
                opened,
                name,
                policy,
                device=self._process.settings.device,
                into=private.make,
                circumstances=Circumstances(
                    base_model=base_model,
                    left_out_of_model=modules.left_out,
                    plan=None if experiment is None else experiment.plan,
                    asked_with=asked_with,
                ),
            ).verdict
            if is_refused(verdict) and not store_refused:
                return verdict, None
            return verdict, self._process.store.add(private, verdict, policy.store.max_bytes)

    def recheck(
        self,
        before: Verdict,
        stored: Path,
        experiment: Experiment | None,
        *,
        base_model: str | None,
        modules: ModelModules,
    ) -> Verdict:
        """The verdict of policy and plans in force on a stored copy; nothing is changed.

        It is made on the adapter's own bytes, which the store keeps beside transformed ones. An
        experiment keeps its settings, as far as the policy in force allows them.
        """
        policy = self._process.reload_policy()
        try:
            real = os.path.realpath(before.path)
            policy = _policy_for(policy, before.name, real, base_model, experiment)
            open_stored_copy(stored)
        except (AdapterRejected, PolicyInvalid) as obstacle:
            return _rejected_now(before, policy, obstacle)
        own = own_folder(stored)
        now = admit(
            own,
            before.name,
            policy,
            device=self._process.settings.device,
            circumstances=Circumstances(
                base_model=base_model,
                left_out_of_model=modules.left_out,
                origin=Path(before.path),
                plan=None if experiment is None else experiment.plan,
                vouchers=before.vouchers,
            ),
        ).verdict
        # None: refused before it was read, for example because a limit was lowered.
        read, config = now.digest, now.config_digest
        if read not in (None, before.digest) or config not in (None, before.config_digest):
            changed = StoreDamaged(f"{own} does not hold what was registered")
            return _rejected_now(before, policy, changed)
        return now.without_spectra()


def _policy_for(
    policy: Policy,
    name: str,
    real_path: str,
    base_model: str | None,
    experiment: Experiment | None,
) -> Policy:
    """The policy that decides on an adapter: the one in force, or an experiment's.

    Raises:
        ExperimentClosed, NameReserved, PolicyInvalid: see `policy/experiment.py`.
    """
    check_name(policy, name, is_experiment=experiment is not None)
    if experiment is None:
        return policy
    own = policy.for_adapter(name, real_path, base_model)
    return experiment_policy(own, experiment.settings, with_plan=experiment.plan is not None)


def _rejected_now(before: Verdict, policy: Policy, obstacle: S3LoRAError) -> Verdict:
    now = replace(before, policy_digest=policy.digest, mode=policy.mode)
    return with_rejection(now, Reason.of(obstacle))
