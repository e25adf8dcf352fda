"""`s3lora_adapter_modules_stripped{adapter_name}`: a gauge whose names tenants choose, bounded."""

from prometheus_client import CollectorRegistry, Gauge

MAX_NAMES = 200
"""Adapter names that become labels. Series cannot be removed where several processes share a
folder of metrics, so a name keeps its place for good, and there must be an end."""

MAX_NAME_LENGTH = 256
"""Names beyond it are `other` too."""

OTHER = "other"


class AdapterGauge:
    """Modules stripped from each served adapter; 0 once it is unloaded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauge = Gauge(
            "s3lora_adapter_modules_stripped",
            "LoRA modules stripped from a served adapter, 0 once it is unloaded.",
            ("adapter_name",),
            registry=registry,
            multiprocess_mode="livemax",  # API servers that serve the same adapters agree
        )
        self._named: set[str] = set()
        self._others: dict[str, int] = {}

    def serve(self, name: str, stripped: int) -> None:
        """An adapter is served with so many modules stripped, also in place of another's."""
        if name in self._named or self._takes(name):
            self._named.add(name)
            self._gauge.labels(name).set(stripped)
        else:
            self._others[name] = stripped
            self._show_others()

    def withdraw(self, name: str) -> None:
        """An adapter is no longer served."""
        if name in self._named:
            self._gauge.labels(name).set(0)
        elif self._others.pop(name, None) is not None:
            self._show_others()

    def _takes(self, name: str) -> bool:
        return len(self._named) < MAX_NAMES and len(name) <= MAX_NAME_LENGTH and name != OTHER

    def _show_others(self) -> None:
        self._gauge.labels(OTHER).set(sum(self._others.values()))
