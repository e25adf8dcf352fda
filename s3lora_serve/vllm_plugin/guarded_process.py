"""What the parts of the gate share in one process: settings, policy, store and telemetry."""

from collections.abc import Callable
from functools import cached_property

from s3lora_serve.admission.policy_files import check_policy_files
from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.reload import ReloadablePolicy
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.statistics_file import share_in
from s3lora_serve.settings import Settings
from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.telemetry.events import AdmissionEvents
from s3lora_serve.vllm_plugin import compat


class GuardedProcess:
    """One process of vLLM with the gate in it: an API server, a worker, or both in one."""

    def __init__(self, settings: Settings) -> None:
        """Read the policy.

        Raises:
            PolicyInvalid, SettingInvalid: it is not valid, or its folder of plans is not to be
                trusted, or another file that it names cannot be used.
        """
        self.settings = settings
        self.store = AdapterStore(settings.state_dir)
        share_in(self.store.root / "statistics")
        self._file = ReloadablePolicy(settings, check_policy_files)
        # Why the file as it is now was not taken; the policy of before is in force.
        self.policy_problem: str | None = None
        # Called after a changed policy is in force, in the thread that has reloaded it.
        self.policy_changed: Callable[[], object] = lambda: None

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._file.current

    @cached_property
    def events(self) -> AdmissionEvents:
        """Created on first use: a process that registers metrics shows them, even at 0."""
        return AdmissionEvents(
            self.policy, self.settings.device, compat.logger, compat.installed_version()
        )

    def reload_policy(self) -> Policy:
        """The policy in force after a look at its file; an invalid file changes nothing."""
        before = self.policy
        try:
            policy = self._file.reload()
        except PolicyInvalid as error:
            self.policy_problem = str(error)
            self.events.policy_kept(str(error), self.policy)
            return self.policy
        self.policy_problem = None
        if policy is not before:
            self.policy_changed()
        return policy
