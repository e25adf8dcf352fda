"""The end of experiments that the policy in force no longer allows, or not for longer."""

import asyncio
from contextlib import suppress
from time import monotonic
from typing import Any

from s3lora_serve.errors import ExperimentClosed, Reason, S3LoRAError
from s3lora_serve.policy.experiment import check_open
from s3lora_serve.policy.schema import Policy
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.api.adapter_registrations import AdapterRegistrations
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter

RETRY_SECONDS = 1.0
"""Least time between two looks that nothing but the clock causes. Ours: vLLM may fail to unload."""


class ExperimentEnds:
    """Unloads experiments when the policy closes them or their time to live has passed.

    One task does it. It runs while there are experiments, and looks at them when the policy is
    reloaded, when one is registered, and when the time of one is over.
    """

    def __init__(self) -> None:
        self._look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def watch(self, registrations: AdapterRegistrations, models: Any) -> None:
        """Look at the experiments that are registered now, and at each until it ends.

        `models` is vLLM's registry of served models.
        """
        loop = asyncio.get_running_loop()
        registrations.on_policy_change(lambda: loop.call_soon_threadsafe(self._look.set))
        self._look.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(registrations, models))

    async def _run(self, registrations: AdapterRegistrations, models: Any) -> None:
        allowed: dict[int, Policy] = {}  # by adapter id: the policy that was found to allow it
        while True:
            self._look.clear()
            policy = registrations.policy
            for one in _experiments(registrations):
                if reason := await _reason_to_end(policy, one, allowed):
                    await _end(registrations, models, one, reason)
            left = {
                one.adapter_id: _seconds_left(policy, one) for one in _experiments(registrations)
            }
            if not left:
                return
            allowed = {number: seen for number, seen in allowed.items() if number in left}
            soonest = min((each for each in left.values() if each is not None), default=None)
            with suppress(TimeoutError):
                wait = None if soonest is None else max(soonest, RETRY_SECONDS)
                await asyncio.wait_for(self._look.wait(), wait)


def _experiments(registrations: AdapterRegistrations) -> list[ServedAdapter]:
    return [one for one in registrations.served.all() if one.experiment is not None]


async def _reason_to_end(
    policy: Policy, one: ServedAdapter, allowed: dict[int, Policy]
) -> Reason | None:
    """Why the policy no longer allows an experiment; None if it does."""
    own = one.experiment
    if own is not None and allowed.get(one.adapter_id) is not policy:
        asked = policy, one.verdict.name, own.settings
        try:
            await asyncio.to_thread(check_open, *asked, with_plan=own.plan is not None)
        except S3LoRAError as closed:
            return Reason.of(closed)
        allowed[one.adapter_id] = policy
    left = _seconds_left(policy, one)
    if left is None or left > 0:
        return None
    ttl = policy.experiments.ttl if policy.experiments else None
    return Reason.of(ExperimentClosed(f"its time is over: experiments.ttl is {ttl:g} s"))


def _seconds_left(policy: Policy, one: ServedAdapter) -> float | None:
    """How long an experiment may still run; None: for ever."""
    if policy.experiments is None or policy.experiments.ttl is None:
        return None
    return one.started + policy.experiments.ttl - monotonic()


async def _end(
    registrations: AdapterRegistrations, models: Any, one: ServedAdapter, reason: Reason
) -> None:
    """Unload an experiment, and report it; one that was ended or replaced meanwhile is left."""
    name = one.verdict.name
    if registrations.served.get(name) is not one:
        return
    try:
        result = await models.unload_lora_adapter(compat.unload_request_model()(lora_name=name))
    except Exception:  # noqa: BLE001 - whatever vLLM raises, the other experiments are ended
        compat.logger.exception("s3lora: experiment %r was not unloaded", name)
        return
    if isinstance(result, str):
        await registrations.reports.experiment_ended(one.verdict, reason)
