"""Horizontal bars, one row a model: for quantities that were measured at one place only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from ham.report.aggregate import Cell
from ham.report.palette import INK, MUTED
from ham.report.plots_base import Look, new_figure
from ham.report.plots_labels import label_margin

Bars = Mapping[str, Cell]
ROW_INCHES = 0.21


def bar_figure(
    title: str,
    subtitle: str,
    panels: Mapping[str, Bars],
    look: Look,
    order: list[str],
    footer: str,
    unit: str,
    write: Callable[[float], str],
) -> Figure:
    """A figure with a panel for each quantity and a row for each model.

    Args:
        title: Bold first line.
        subtitle: Second line.
        panels: Cells by title of the panel and model.
        look: Colours.
        order: Models from above.
        footer: Small print.
        unit: Below each panel.
        write: Writes a value behind its bar.
    """
    rows = [model for model in order if any(model in bars for bars in panels.values())]
    figure, axes_list = new_figure(
        title,
        subtitle,
        columns=len(panels),
        panel_height=ROW_INCHES * len(rows) + 0.2,
        left=label_margin(rows),
        right=0.2,
        gap=0.2,
        titled=True,
        footer=footer,
    )
    for axes, (name, bars) in zip(axes_list, panels.items(), strict=True):
        _panel(axes, rows, bars, look, write)
        axes.set_title(name)
        axes.set_xlabel(unit)
        axes.set_yticklabels(rows if axes is axes_list[0] else [], color=INK)
    return figure


def _panel(
    axes: Axes,
    rows: list[str],
    bars: Bars,
    look: Look,
    write: Callable[[float], str],
) -> None:
    estimates = [cell.estimate for cell in bars.values() if cell.estimate is not None]
    longest = max((max(one.value, one.high or 0.0) for one in estimates), default=0.0) or 1.0
    for index, model in enumerate(rows):
        if model in bars:
            _bar(axes, index, bars[model], look.styles[model].color, longest, write)
    # The values behind the bars take about a third of the width.
    axes.set_xlim(0, 1.45 * longest)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(rows)))))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)


def _bar(
    axes: Axes, y: int, cell: Cell, color: str, longest: float, write: Callable[[float], str]
) -> None:
    estimate = cell.estimate
    if estimate is None:
        axes.text(0.02 * longest, y, cell.status, va="center", color=MUTED, fontsize=7.5)
        return
    axes.barh([y], [estimate.value], height=0.7, color=color)
    end = estimate.value
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [y, y], color=INK, linewidth=1.1)
        end = max(end, estimate.high)
    axes.text(
        end + 0.03 * longest, y, write(estimate.value), va="center", color=MUTED, fontsize=7.5
    )
