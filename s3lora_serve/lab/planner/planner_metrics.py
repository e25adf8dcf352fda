"""What a planner says in Prometheus' format."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS = (10, 30, 60, 120, 300, 600, 1200, 2400, 4800)
"""From a tiny model on a GPU to a large one on a CPU."""


class PlannerMetrics:
    """The planner's collectors in one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.plans = Counter(
            "s3lora_planner_plans_total",
            "Calibrations that ended, by whether there is a plan.",
            ("outcome",),
            registry=registry,
        )
        for outcome in ("made", "failed"):
            self.plans.labels(outcome)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"s3lora_planner_{name}", text, registry=registry)

        self.waiting = gauge("waiting", "Adapters that are served without a plan and wait for one.")
        self.given_up = gauge(
            "given_up", "Adapters that are served and for which no plan can be made."
        )
        self.oldest_seconds = gauge(
            "oldest_waiting_seconds", "How long the adapter waits that waits longest."
        )
        self.unreachable = gauge(
            "unreachable_servers", "Servers that did not answer at the last look."
        )
        self.seconds = Histogram(
            "s3lora_planner_calibration_seconds",
            "Time of one calibration.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
