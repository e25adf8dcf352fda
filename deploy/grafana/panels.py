"""The panel types of the dashboard, with one style and one data source."""

from typing import Any, TypeAlias

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'job=~"$job", instance=~"$instance"'
"""Label matchers for the servers that are selected at the top of the dashboard."""

Panel: TypeAlias = Builder[model.Panel]

GOOD, WARNING, BAD = "green", "orange", "red"


def query(expression: str, legend: str = "", *, instant: bool = False) -> Dataquery:
    """A PromQL query. HERE stands for the label matchers of the selected servers."""
    built = Dataquery().expr(expression.replace("HERE", HERE)).legend_format(legend)
    built = built.ref_id("A").datasource(SOURCE)
    return built.instant().format(PromQueryFormat.TABLE) if instant else built.range()


def number(
    title: str, text: str, expression: str, legend: str = "", *, limits: dict[float, str]
) -> stat.Panel:
    """One value, or one for each replica. `limits` maps each lower bound to a colour."""
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .with_target(query(expression, legend))
        .thresholds(_steps(limits))
        .color_mode(look.BigValueColorMode.BACKGROUND)
        .graph_mode(look.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .height(5)
        .span(6)
    )


def lines(
    title: str, text: str, unit: str, *queries: Dataquery, span: int = 12
) -> timeseries.Panel:
    """A chart of series over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .fill_opacity(8)
        .show_points(look.VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .display_mode(look.LegendDisplayMode.LIST)
            .placement(look.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .height(8)
        .span(span)
    )
    for letter, one in zip("ABC", queries, strict=False):
        panel = panel.with_target(one.ref_id(letter))
    return panel


def distribution(title: str, text: str, expression: str) -> heatmap.Panel:
    """A heat map of a histogram over time."""
    return (
        heatmap.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .with_target(query(expression, "{{le}}").format(PromQueryFormat.HEATMAP))
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heat.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .steps(32)
            .exponent(0.5)
        )
        .y_axis(heatmap.YAxisConfig().axis_label("index").decimals(2))
        .height(8)
        .span(12)
    )


def matrix(
    title: str, text: str, expression: str, *, row: str, column: str, limits: dict[float, str]
) -> table.Panel:
    """A table of values by two labels. `limits` maps each lower bound to a cell colour."""
    return (
        _table(title, text, expression)
        .with_transformation(
            model.DataTransformerConfig(
                id_val="groupingToMatrix",
                options={"rowField": row, "columnField": column, "valueField": "Value"},
            )
        )
        .thresholds(_steps(limits))
        .override_by_regexp(
            f"^(?!{row}).*$",
            [
                model.DynamicConfigValue(
                    id_val="custom.cellOptions",
                    value={"type": "color-background", "mode": "basic"},
                )
            ],
        )
        .height(10)
        .span(12)
    )


def rows(title: str, text: str, expression: str, *, value: str) -> table.Panel:
    """A table of series: their labels, and their values in a column named `value`."""
    return (
        _table(title, text, expression)
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize",
                options={"excludeByName": {"Time": True}, "renameByName": {"Value": value}},
            )
        )
        .height(5)
        .span(12)
    )


def ranking(title: str, text: str, expression: str, legend: str) -> bargauge.Panel:
    """A bar for each series."""
    return (
        bargauge.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .with_target(query(expression, legend))
        .orientation(look.VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .min(0)
        .thresholds(_steps({0: WARNING}))
        .height(10)
        .span(12)
    )


def _table(title: str, text: str, expression: str) -> table.Panel:
    return (
        table.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .with_target(query(expression, instant=True))
    )


def _steps(limits: dict[float, str]) -> dashboard.ThresholdsConfig:
    first, *rest = limits.items()
    steps: list[Any] = [model.Threshold(value=None, color=first[1])]
    steps += [model.Threshold(value=value, color=color) for value, color in rest]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
