"""All metrics of the gate. Names are `s3lora_<noun>_<unit or total>`, units are base units.

Series of closed label sets exist with value 0 from the start. Workers and the API server are
separate processes, so all metrics also work in prometheus_client's multiprocess mode, which
supports only counters, histograms and gauges with a mode.
"""

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from s3lora_serve.admission.verdict import Decision, Verdict, served_stripped_count
from s3lora_serve.errors import rejection_codes
from s3lora_serve.spectral import FALLBACK_CAUSES
from s3lora_serve.telemetry.per_adapter_gauge import OTHER, AdapterGauge
from s3lora_serve.telemetry.policy_gauge import PolicyGauge

MODES = ("enforce", "audit")
PHASES = ("read", "score", "strip", "total")
DEVICES = ("cpu", "cuda")
FAILURES = ("audit", "score", "deadline", "store", "policy")
SOURCES = ("store", "path")
SELECTORS = ("plan", "repair", "index")
POSTPONED = ("queue", "rate")

SSI_BUCKETS = (0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""SSI lies in [1/M, 1]. Isotropic updates of common ranks lie close together at its low end."""

ALIGNMENT_BUCKETS = (
    -2.0,
    -1.0,
    -0.5,
    0.0,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.35,
    0.5,
    0.75,
    1.0,
    2.0,
    4.0,
)
"""safe-lora lies in [0, 1], and near 0 for most modules; splora counts quartile distances."""

SHARE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Shares of an effect: what is wanted lies near 0 for harmful and near 1 for benign inputs."""

SUSPICION_BUCKETS = (-5, -2, -1, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20)
"""Harmless adapters of the bench lie between 0 and 2.1, most harmful ones above 2.5."""

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""From the time for one small module to the default deadline."""


class Metrics:
    """The gate's collectors in one registry. Created once per process, never at import."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._count_adapters()
        self._count_modules()
        self._measure_times()
        self._gauges: dict[str, Gauge] = {}
        self._worker: tuple[Gauge, PolicyGauge] | None = None
        self._served: AdapterGauge | None = None
        self._modules: frozenset[tuple[str, str]] = frozenset()
        self._start_at_zero()

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"s3lora_{name}", text, tuple(labels), registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()
    ) -> Histogram:
        own = self._registry
        return Histogram(f"s3lora_{name}", text, tuple(labels), buckets=buckets, registry=own)

    def _count_adapters(self) -> None:
        counter = self._counter
        self.admissions = counter(
            "admissions_total", "Decisions on adapters.", ("decision", "mode")
        )
        self.experiments = counter(
            "experiments_total",
            "Decisions on experiments, which no other metric counts.",
            ("decision",),
        )
        self.selections = counter(
            "selections_total",
            "Adapters not rejected, by what chose their changed modules.",
            ("selected_by",),
        )
        self.failures = counter("failures_total", "Failures of the gate itself.", ("reason",))
        self.quarantined = counter(
            "quarantined_total", "Adapters served without effect.", ("reason",)
        )
        self.reloads = counter(
            "reloads_total",
            "Evicted adapters loaded again; path stays 0: nothing is read again from its folder.",
            ("source",),
        )
        self.device_fallbacks = counter(
            "device_fallbacks_total",
            "Adapters that the CPU scored, at least in part, in place of a device that failed.",
            ("cause",),
        )
        self.postponed_loads = counter(
            "postponed_loads_total",
            "Loads turned away (429) before the adapter was looked at; they may be tried again.",
            ("reason",),
        )

    def _count_modules(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.modules_scored = counter(
            "modules_scored_total", "LoRA modules scored.", ("projection",)
        )
        self.modules_stripped = counter(
            "modules_stripped_total", "LoRA modules stripped.", ("layer", "projection")
        )
        self.modules_projected = counter(
            "modules_projected_total", "LoRA modules projected.", ("layer", "projection")
        )
        self.modules_repaired = counter(
            "modules_repaired_total", "LoRA modules repaired.", ("layer", "projection")
        )
        self.module_ssi = histogram(
            "module_ssi",
            "Spectral Sharpness Index of scored modules, whatever the scorer.",
            SSI_BUCKETS,
            ("projection",),
        )
        self.module_alignment = histogram(
            "module_alignment",
            "Score of safe-lora or splora, low: not aligned; stays empty with another scorer.",
            ALIGNMENT_BUCKETS,
            ("projection",),
        )
        self.repair_residual = histogram(
            "repair_residual",
            "Share of a repaired adapter's effect on refusals that is left.",
            SHARE_BUCKETS,
        )
        self.repair_kept = histogram(
            "repair_kept",
            "Share of a repaired adapter's effect on benign inputs that is left.",
            SHARE_BUCKETS,
        )
        self.suspicion = histogram(
            "suspicion",
            "What an adapter takes of refusals before repair, for each percent that it moves.",
            SUSPICION_BUCKETS,
        )

    def _measure_times(self) -> None:
        self.admission_seconds = self._histogram(
            "admission_seconds", "Time to decide on an adapter.", SECONDS_BUCKETS, ("phase",)
        )
        self.scoring_seconds = self._histogram(
            "scoring_seconds", "Time to score an adapter.", SECONDS_BUCKETS, ("device",)
        )

    def _start_at_zero(self) -> None:
        for mode in MODES:
            for decision in Decision:
                self.admissions.labels(decision.value, mode)
        for decision in Decision:
            self.experiments.labels(decision.value)
        for phase in PHASES:
            self.admission_seconds.labels(phase)
        for device in DEVICES:
            self.scoring_seconds.labels(device)
        for cause in FALLBACK_CAUSES:
            self.device_fallbacks.labels(cause)
        for selector in SELECTORS:
            self.selections.labels(selector)
        for source in SOURCES:
            self.reloads.labels(source)
        for reason in FAILURES:
            self.failures.labels(reason)
        for reason in POSTPONED:
            self.postponed_loads.labels(reason)
        for code in rejection_codes():
            self.quarantined.labels(code)

    def set_model_modules(self, places: Iterable[tuple[str, str]]) -> None:
        """Set the closed label sets from (layer, projection) of each module of the base model."""
        self._modules = frozenset(places) | {(OTHER, OTHER)}
        for layer, projection in self._modules:
            self.modules_stripped.labels(layer, projection)
            self.modules_scored.labels(projection)
            self.module_ssi.labels(projection)
            self.module_alignment.labels(projection)
            self.modules_projected.labels(layer, projection)
            self.modules_repaired.labels(layer, projection)

    def activate(self, policy_digest: str, mode: str, version: str) -> None:
        """Set the gauges that show the policy in force, and whether the gate is active.

        Only workers have these gauges: in another process, a 0 would look like a worker without
        the gate.
        """
        if self._worker is None:
            active = Gauge(
                "s3lora_gate_active",
                "1 in a worker whose adapters all pass the gate.",
                registry=self._registry,
                multiprocess_mode="liveall",
            )
            self._worker = active, PolicyGauge(self._registry)
        active, policy = self._worker
        active.set(0 if mode == "off" else 1)
        policy.show(policy_digest, mode, version)

    def serve(self, verdict: Verdict) -> None:
        """Record that an adapter is served. Only API servers serve adapters by name."""
        if self._served is None:
            self._served = AdapterGauge(self._registry)
        self._served.serve(verdict.name, served_stripped_count(verdict))

    def withdraw(self, name: str) -> None:
        """Record that an adapter is no longer served."""
        if self._served is not None:
            self._served.withdraw(name)

    def record(self, verdict: Verdict, device: str) -> None:
        """Record one decision."""
        self.admissions.labels(verdict.decision.value, verdict.mode).inc()
        if verdict.decision is not Decision.REJECTED:
            self.selections.labels(verdict.selected_by).inc()
        self._observe("read", verdict.seconds.read)
        self._observe("total", verdict.seconds.total)
        if verdict.modules:
            self._observe("score", verdict.seconds.score)
            self.scoring_seconds.labels(device).observe(verdict.seconds.score)
        if verdict.repair is not None:
            self.repair_residual.observe(verdict.repair.residual)
            self.repair_kept.observe(verdict.repair.kept)
        if verdict.suspicion is not None:
            self.suspicion.observe(verdict.suspicion)
        for module in verdict.modules:
            layer, projection = self._labels_of(module.layer, module.projection)
            if module.ssi is not None:
                self.modules_scored.labels(projection).inc()
                self.module_ssi.labels(projection).observe(module.ssi)
            if module.alignment is not None:
                self.module_alignment.labels(projection).observe(module.alignment)
            if module.stripped and verdict.mode == "enforce":
                self.modules_stripped.labels(layer, projection).inc()
            if module.projected and verdict.mode == "enforce":
                self.modules_projected.labels(layer, projection).inc()
            if module.repaired and verdict.mode == "enforce":
                self.modules_repaired.labels(layer, projection).inc()

    def set_waiting_loads(self, count: int) -> None:
        """Record how many loads wait for their turn. Only API servers have the gauge."""
        self._gauge("waiting_loads", "Loads that wait for their turn.").set(count)

    def set_preloads(self, count: int) -> None:
        """Record how many stored copies are read for loads under way. Only workers have it."""
        self._gauge("preloads", "Stored copies that workers hold for loads under way.").set(count)

    def _gauge(self, name: str, text: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(
                f"s3lora_{name}", text, registry=self._registry, multiprocess_mode="livesum"
            )
        return self._gauges[name]

    def observe_strip(self, seconds: float) -> None:
        """Record the time from the verdict until the adapter is ready for vLLM to load."""
        self._observe("strip", seconds)

    def _observe(self, phase: str, seconds: float) -> None:
        self.admission_seconds.labels(phase).observe(seconds)

    def _labels_of(self, layer: int | None, projection: str) -> tuple[str, str]:
        labels = (OTHER if layer is None else str(layer), projection)
        return labels if labels in self._modules else (OTHER, OTHER)
