"""The models of one worker process, by vLLM's managers, and the gate's start in each."""

from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel
from s3lora_serve.vllm_plugin.engine.operator_files_fit import check_operator_files_fit
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess


class WorkerModels:
    """The model of each manager that this process has created."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self.latest = WorkerModel()
        self._models: WeakKeyDictionary[Any, WorkerModel] = WeakKeyDictionary()

    def of(self, manager: Any) -> WorkerModel:
        """The model whose adapters a manager loads."""
        return self._models.get(manager, self.latest)

    def activate(self, manager: Any, vllm_config: Any) -> None:
        """Read the worker's LoRA modules, and report that its gate is active.

        Raises:
            PolicyInvalid: a file that the policy names was made for another model.
        """
        model = WorkerModel.of(manager, vllm_config)
        if self._process.policy.mode != "off":
            check_operator_files_fit(model, self._process.policy)
        self.latest = self._models[manager] = model
        self._process.events.metrics.set_model_modules(model.places)
        self._process.events.metrics.set_preloads(0)
        self.report_policy()

    def report_policy(self) -> None:
        """Report the policy in force, in metrics and log."""
        policy, release = self._process.policy, version("s3lora-serve")
        self._process.events.metrics.activate(policy.digest, policy.mode, release)
        compat.logger.info(
            "s3lora %s: gate in mode %s, policy %s", release, policy.mode, policy.digest
        )
