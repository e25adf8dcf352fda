"""`s3lora_policy_info`: the policy in force, in one series however often the policy changes."""

import os
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.multiprocess import MultiProcessCollector

NAME = "s3lora_policy_info"


class PolicyGauge:
    """Has value 1 under the labels of the policy in force in a worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauge = Gauge(
            NAME,
            "The policy in force, always 1; that of a former policy ends once no worker has it.",
            ("policy_digest", "mode", "version"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._labels: tuple[str, str, str] | None = None

    def show(self, policy_digest: str, mode: str, version: str) -> None:
        """Replace the policy that is shown."""
        labels = policy_digest, mode, version
        if self._labels not in (None, labels):
            self._hide(self._labels)
        self._labels = labels
        self._gauge.labels(*labels).set(1)

    def _hide(self, labels: Iterable[str]) -> None:
        """Remove a series; multiprocess mode cannot, so there it is 0 and left out later."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            self._gauge.labels(*labels).set(0)
        else:
            self._gauge.remove(*labels)


def leave_out_former_policies() -> None:
    """Have multiprocess collectors of this process leave out policies that no worker has."""
    collector: Any = MultiProcessCollector
    original = collector.collect

    def collect(self: Any) -> Iterable[Metric]:
        for metric in original(self):
            if metric.name == NAME:
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric

    collector.collect = collect
