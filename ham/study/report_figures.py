"""Figures of the study: accuracy and routing against the number of pairs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ham.report.aggregate import Point, Results
from ham.report.palette import MUTED
from ham.report.plots_axes import log_x_ticks
from ham.report.plots_base import (
    Look,
    draw_points,
    failed_words,
    legend_lines,
    mark_failures,
    model_legend,
    new_figure,
)
from ham.report.plots_recall import sidestep
from ham.report.plots_seeds import footer_text
from ham.study.report_tables import beyond_training, in_training, settings_of, words_for
from ham.study.runs import EXPERIMENT

# Pairs grow by a half at least from point to point: bars of one size never meet those of the next.
SIDESTEP_OCTAVES = 0.3
TITLE_CHARACTERS = 108
"""What the titles of a row of panels have room for."""

Panel = tuple[str, dict[str, object]]


def accuracy_figure(results: Results) -> Figure:
    """Accuracy against pairs, one panel for each setting."""
    panels = [(words_for(setting), dict(setting)) for setting in settings_of(results)]
    return _figure(
        results,
        "accuracy",
        panels,
        "Associative recall by routing score",
        "share of queried keys whose value is right; thresholds frozen",
        columns=3,
    )


def routing_figure(results: Results, metric: str, title: str, subtitle: str) -> Figure:
    """A metric of routing layers against pairs, one panel for each setting and layer.

    A setting of which no arm that routes has run yet has no panel.
    """
    layers = results.label_values(EXPERIMENT, metric, "layer")
    panels = [
        (f"{words_for(setting)}, layer\u00a0{layer + 1}", {**setting, "layer": layer})
        for setting in settings_of(results)
        for layer in layers
        if results.find(EXPERIMENT, metric, **setting, layer=layer)
    ]
    return _figure(results, metric, panels, title, subtitle, columns=4)


def _figure(
    results: Results,
    metric: str,
    panels: Sequence[Panel],
    title: str,
    subtitle: str,
    columns: int,
) -> Figure:
    look = Look.of(results)
    lines = [
        {
            model: results.series(EXPERIMENT, metric, model=model, **where)
            for model in results.models
        }
        for _, where in panels
    ]
    shown = [model for model in results.models if any(panel[model] for panel in lines)]
    failed = dict(pair for panel in lines for pair in panel.items() if failed_words(dict([pair])))
    columns = min(columns, len(panels))
    figure, axes = new_figure(
        title,
        subtitle,
        columns=columns,
        rows=-(-len(panels) // columns),
        panel_height=1.75,
        left=0.7,
        right=0.15,
        gap=0.22,
        row_gap=0.88,
        sharey=True,
        # Names beside the lines would end on one point, where every arm fails.
        legend=legend_lines(shown) + 1,
        titled=True,
        footer=footer_text(
            results,
            look,
            "bar: 95 % t interval",
            "right of the dotted line: longer than trained"
            if results.find(EXPERIMENT, metric, keep=beyond_training)
            else "",
            failed_words(failed),
        ),
    )
    for one, (name, where), models in zip(axes, panels, lines, strict=False):
        _draw_panel(one, models, look, results, metric, where)
        one.set_title(textwrap.fill(name, TITLE_CHARACTERS // columns), fontsize=7.5)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    for one in axes[::columns]:
        one.set_ylabel("share")
    model_legend(figure, look, shown, bool(failed))
    return figure


def _draw_panel(
    axes: Axes,
    models: dict[str, list[Point]],
    look: Look,
    results: Results,
    metric: str,
    where: dict[str, object],
) -> None:
    present = [model for model, points in models.items() if points]
    for index, model in enumerate(present):
        aside = sidestep(index, len(present), SIDESTEP_OCTAVES)
        points = models[model]
        xs = [point.x * aside for point in points]
        draw_points(axes, points, look.styles[model], xs=xs, size=4.0, bar_width=0.8)
    mark_failures(axes, models, look)
    log_x_ticks(axes, results.x_values(EXPERIMENT, metric, **where))
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.08, right * 1.08)
    inside = results.x_values(EXPERIMENT, metric, keep=in_training, **where)
    outside = results.x_values(EXPERIMENT, metric, keep=beyond_training, **where)
    if inside and outside:
        border = math.sqrt(max(inside) * min(outside))
        axes.axvline(border, color=MUTED, linestyle=":", linewidth=1.0)
    axes.set_ylim(-0.02, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.set_xlabel("key-value pairs")
