"""Figures of the study: accuracy and routing against the number of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ham.report.aggregate import Point, Results
from ham.report.palette import MUTED
from ham.report.plots_axes import log_x_ticks
from ham.report.plots_base import Look, draw_points, failed_words, mark_failures, new_figure
from ham.report.plots_labels import label_line_ends, label_margin
from ham.report.plots_seeds import footer_text
from ham.study.report_tables import beyond_training, in_training, settings_of, words_for
from ham.study.runs import EXPERIMENT

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
    )


def routing_figure(results: Results, metric: str, title: str, subtitle: str) -> Figure:
    """A metric of routing layers against pairs, one panel for each setting and layer.

    A setting of which no arm that routes has run yet has no panel.
    """
    layers = results.label_values(EXPERIMENT, metric, "layer")
    panels = [
        (f"{words_for(setting)}, layer {layer + 1}", {**setting, "layer": layer})
        for setting in settings_of(results)
        for layer in layers
        if results.find(EXPERIMENT, metric, **setting, layer=layer)
    ]
    return _figure(results, metric, panels, title, subtitle)


def _figure(
    results: Results, metric: str, panels: Sequence[Panel], title: str, subtitle: str
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
    columns = min(2, len(panels))
    figure, axes = new_figure(
        title,
        subtitle,
        columns=columns,
        rows=-(-len(panels) // columns),
        right=label_margin(shown),
        gap=label_margin(shown) + 0.25,
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
        one.set_title(name, fontsize=7.5)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    return figure


def _draw_panel(
    axes: Axes,
    models: dict[str, list[Point]],
    look: Look,
    results: Results,
    metric: str,
    where: dict[str, object],
) -> None:
    ends = {
        model: draw_points(axes, points, look.styles[model])
        for model, points in models.items()
        if points
    }
    mark_failures(axes, models, look)
    log_x_ticks(axes, results.x_values(EXPERIMENT, metric, **where))
    inside = results.x_values(EXPERIMENT, metric, keep=in_training, **where)
    outside = results.x_values(EXPERIMENT, metric, keep=beyond_training, **where)
    if inside and outside:
        border = math.sqrt(max(inside) * min(outside))
        axes.axvline(border, color=MUTED, linestyle=":", linewidth=1.0)
    axes.set_ylim(-0.02, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.set_xlabel("key-value pairs")
    label_line_ends(axes, {model: end for model, end in ends.items() if end}, look)
