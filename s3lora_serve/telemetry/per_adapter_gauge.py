"""`s3lora_adapter_modules_stripped{adapter_name}`: a gauge with a bounded number of series."""

from prometheus_client import CollectorRegistry, Gauge

MAX_NAMES = 200
"""Maximum number of adapter names, which tenants choose, with a series each. Series cannot be
removed in multiprocess mode, so a name keeps its series, and their number needs a bound."""

MAX_NAME_LENGTH = 256
"""Longer names share the series of `other` too."""

OTHER = "other"


class AdapterGauge:
    """Modules stripped from each served adapter; 0 once it is unloaded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauge = Gauge(
            "s3lora_adapter_modules_stripped",
            "LoRA modules stripped from a served adapter, 0 once it is unloaded; of names beyond"
            " 200 together as `other`.",
            ("adapter_name",),
            registry=registry,
            multiprocess_mode="livemax",  # equal where several API servers serve an adapter
        )
        self._named: set[str] = set()
        self._others: dict[str, int] = {}

    def serve(self, name: str, stripped: int) -> None:
        """Record that an adapter is served, which may replace another one of the same name."""
        if name in self._named or self._can_add(name):
            self._named.add(name)
            self._gauge.labels(name).set(stripped)
        else:
            self._others[name] = stripped
            self._set_others()

    def withdraw(self, name: str) -> None:
        """Record that an adapter is no longer served."""
        if name in self._named:
            self._gauge.labels(name).set(0)
        elif self._others.pop(name, None) is not None:
            self._set_others()

    def _can_add(self, name: str) -> bool:
        return len(self._named) < MAX_NAMES and len(name) <= MAX_NAME_LENGTH and name != OTHER

    def _set_others(self) -> None:
        self._gauge.labels(OTHER).set(sum(self._others.values()))
