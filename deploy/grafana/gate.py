"""The gate's Grafana dashboard: whether it is active, its decisions and its cost."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import dashboard as model

from deploy.grafana.panels import (
    BAD,
    GOOD,
    SOURCE,
    WARNING,
    Panel,
    distribution,
    lines,
    matrix,
    number,
    query,
    ranking,
    rows,
)

RATE = "[$__rate_interval]"
RANGE = "[$__range]"


def gate() -> dashboard.Dashboard:
    """The dashboard of all metrics of the gate, beside vLLM's latency."""
    board = (
        dashboard.Dashboard("s3lora-serve: the gate for LoRA adapters")
        .uid("s3lora-gate")
        .description("Which adapters are served, what was stripped or refused, what it costs.")
        .tags(["vllm", "lora", "s3lora"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .readonly()
    )
    board = _variables(board)
    for title, panels in {
        "Now": _now(),
        "Decisions": _decisions(),
        "What is sharp": _sharpness(),
        "Cost": _cost(),
        "Plans": _plans(),
        "Trouble": _trouble(),
    }.items():
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def _variables(board: dashboard.Dashboard) -> dashboard.Dashboard:
    board = board.with_variable(
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    )
    # The values come from a metric of vLLM, so that servers without the gate are listed too.
    for name, label, within in (
        ("job", "Job", ""),
        ("instance", "Replica", '{job=~"$job"}'),
    ):
        board = board.with_variable(
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query(f"label_values(vllm:num_requests_running{within}, {name})")
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".+")
            .current(model.VariableOption(selected=True, text="All", value="$__all"))
        )
    return board


def _now() -> list[Panel]:
    return [
        number(
            "Gate active",
            "1 where every worker of a replica is guarded. 0 or no value: see S3LoRAGateAbsent in"
            " the runbook.",
            "min by (instance) (s3lora_gate_active{HERE})"
            " or min by (instance) (vllm:num_requests_running{HERE}) * 0",
            "{{instance}}",
            limits={0: BAD, 1: GOOD},
        ),
        number(
            "Adapters refused",
            "In the time shown.",
            f'sum(increase(s3lora_admissions_total{{HERE, decision="rejected"}}{RANGE}))',
            limits={0: GOOD, 1: WARNING},
        ),
        number(
            "Quarantined",
            "Adapters that answer as the base model, in the time shown.",
            f"sum(increase(s3lora_quarantined_total{{HERE}}{RANGE}))",
            limits={0: GOOD, 0.5: BAD},
        ),
        number(
            "Failures",
            "Things the gate failed to do, in the time shown.",
            f"sum(increase(s3lora_failures_total{{HERE}}{RANGE}))",
            limits={0: GOOD, 0.5: BAD},
        ),
        rows(
            "Policy in force",
            "More than one digest: replicas decide differently.",
            "count by (policy_digest, mode, version) (s3lora_policy_info{HERE} == 1)",
            value="replicas",
        ),
        lines(
            "Guarded replicas",
            "Replicas of vLLM that are up, and those whose workers are all guarded.",
            "short",
            query("count(vllm:num_requests_running{HERE})", "engines up"),
            query("sum(min by (job, instance) (s3lora_gate_active{HERE}))", "guarded replicas"),
        ).height(5),
    ]


def _decisions() -> list[Panel]:
    return [
        lines(
            "Adapters decided on",
            "Each minute, by decision and mode; in audit mode, what enforce would do.",
            "cpm",
            query(
                f"60 * sum by (decision, mode) (rate(s3lora_admissions_total{{HERE}}{RATE}))",
                "{{decision}} ({{mode}})",
            ),
            span=8,
        ),
        lines(
            "Chosen by plan, repair or index",
            "Each minute, adapters not rejected, by what chose their changed modules.",
            "cpm",
            query(
                f"60 * sum by (selected_by) (rate(s3lora_selections_total{{HERE}}{RATE}))",
                "{{selected_by}}",
            ),
            span=8,
        ),
        ranking(
            "Adapters by stripped modules",
            "Of those served now. The first 200 names; `other` is the sum of the rest.",
            "topk(20, max by (adapter_name) (s3lora_adapter_modules_stripped{HERE}) > 0)",
            "{{adapter_name}}",
        )
        .height(8)
        .span(8),
    ]


def _sharpness() -> list[Panel]:
    return [
        matrix(
            "Modules stripped, layer by projection",
            "In the time shown. One place again and again: the adapters have a habit in common.",
            "round(sum by (layer, projection)"
            f" (increase(s3lora_modules_stripped_total{{HERE}}{RANGE})))",
            row="layer",
            column="projection",
            limits={0: "transparent", 1: "light-orange", 5: WARNING, 20: BAD},
        ),
        distribution(
            "Spectral Sharpness Index",
            "Of every module scored. Trained adapters crowd at the low end.",
            f"sum by (le) (increase(s3lora_module_ssi_bucket{{HERE}}{RATE}))",
        ).height(10),
        distribution(
            "Alignment score",
            "Of modules that safe-lora or splora scored. Low: away from what alignment changed.",
            f"sum by (le) (increase(s3lora_module_alignment_bucket{{HERE}}{RATE}))",
        ).height(10),
        distribution(
            "Left by repair on refusals",
            "Of each repaired adapter's effect. High: all of it is small, or max_effect is large.",
            f"sum by (le) (increase(s3lora_repair_residual_bucket{{HERE}}{RATE}))",
        ).height(10),
        distribution(
            "Kept by repair on benign inputs",
            "Of each repaired adapter's effect. Low: it acts where harmful prompts do.",
            f"sum by (le) (increase(s3lora_repair_kept_bucket{{HERE}}{RATE}))",
        ).height(10),
        distribution(
            "Suspicion",
            "Of each adapter, before repair. Over 2.5: as adapters that were trained to comply.",
            f"sum by (le) (increase(s3lora_suspicion_bucket{{HERE}}{RATE}))",
        ).height(10),
    ]


def _cost() -> list[Panel]:
    return [
        lines(
            "Deciding on an adapter, p50",
            "By phase: read (copy, hash, check), score, total; strip is the worker's part.",
            "s",
            _phases(0.5),
        ),
        lines("Deciding on an adapter, p99", "As on the left.", "s", _phases(0.99)),
        lines(
            "vLLM: time between tokens",
            "What tenants feel. It should not follow the admissions below it.",
            "s",
            _vllm(0.5, "inter_token_latency_seconds"),
            _vllm(0.99, "inter_token_latency_seconds"),
        ),
        lines(
            "vLLM: time to the first token",
            "As on the left.",
            "s",
            _vllm(0.5, "time_to_first_token_seconds"),
            _vllm(0.99, "time_to_first_token_seconds"),
        ),
    ]


def _phases(quantile: float) -> Dataquery:
    return query(
        f"histogram_quantile({quantile}, sum by (phase, le)"
        f" (rate(s3lora_admission_seconds_bucket{{HERE}}{RATE})))",
        "{{phase}}",
    )


def _vllm(quantile: float, metric: str) -> Dataquery:
    return query(
        f"histogram_quantile({quantile}, sum by (le) (rate(vllm:{metric}_bucket{{HERE}}{RATE})))",
        f"p{round(100 * quantile)}",
    )


def _plans() -> list[Panel]:
    """Of `s3lora planner`, which is a job of its own."""
    return [
        lines(
            "Adapters without a plan",
            "Waiting for the planner, and those for which it can make none.",
            "short",
            query("sum(s3lora_planner_waiting)", "waiting"),
            query("sum(s3lora_planner_given_up)", "given up"),
            span=8,
        ),
        lines(
            "Calibrations",
            "Each hour, by whether there is a plan.",
            "short",
            query(
                f"3600 * sum by (outcome) (rate(s3lora_planner_plans_total{RATE}))", "{{outcome}}"
            ),
            span=8,
        ),
        lines(
            "Longest wait for a plan",
            "Until then the adapter is served under the policy's repair or strip rule.",
            "s",
            query("max(s3lora_planner_oldest_waiting_seconds)", "longest"),
            span=8,
        ),
    ]


def _trouble() -> list[Panel]:
    return [
        lines(
            "Quarantines",
            "By reason: the S3LORA code, see docs/reference.md. Empty where there was none.",
            "short",
            query(
                f"sum by (reason) (increase(s3lora_quarantined_total{{HERE}}{RATE})) > 0",
                "{{reason}}",
            ),
            span=8,
        ),
        lines(
            "Failures",
            "By reason: see the runbook.",
            "short",
            query(f"sum by (reason) (increase(s3lora_failures_total{{HERE}}{RATE}))", "{{reason}}"),
            span=8,
        ),
        lines(
            "Loaded again",
            "Evicted adapters that came back, from the store of admitted copies.",
            "cpm",
            query(f"60 * sum by (source) (rate(s3lora_reloads_total{{HERE}}{RATE}))", "{{source}}"),
            span=8,
        ),
    ]
