"""Figure of needles by task: accuracy against length, one panel a task."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ham.report.aggregate import Point, Results
from ham.report.formats import share, token_unit
from ham.report.plots_axes import log_x_ticks
from ham.report.plots_base import (
    Drawing,
    Look,
    draw_points,
    legend_lines,
    mark_failures,
    model_legend,
    new_figure,
)
from ham.report.plots_recall import sidestep
from ham.report.plots_seeds import footer_text, interval_words, line_cells, mixed_seeds

COLUMNS = 3

Lines = dict[str, list[Point]]


def needle_tasks(results: Results, look: Look) -> Drawing | None:
    """Accuracy of each task against length with its intervals; None for a single task."""
    tasks = results.tasks("needle", "accuracy")
    lines = {task: _lines(results, task) for task in tasks}
    values = [p.cell.value for task in tasks for line in lines[task].values() for p in line]
    if len(tasks) < 2 or all(value is None for value in values):
        return None
    models = [m for m in results.models if results.find("needle", "accuracy", model=m)]
    cells = [cell for task in tasks for cell in line_cells(lines[task])]
    lengths = results.x_values("needle", "accuracy")
    columns = min(COLUMNS, len(tasks))
    figure, panels = new_figure(
        "Needles by task",
        "share of samples with every answer right, against their length",
        columns=columns,
        rows=math.ceil(len(tasks) / columns),
        panel_height=1.35,
        left=0.7,
        gap=0.35,
        row_gap=0.62,
        titled=True,
        legend=legend_lines(models),
        footer=footer_text(results, look, interval_words(cells), "×: failed", cells=cells),
    )
    mixed = mixed_seeds(cells)
    for index, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        _panel(axes, lines[task], look, task, lengths, mixed)
        if index % columns:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("accuracy")
        if index >= len(tasks) - columns:
            axes.set_xlabel(f"length ({token_unit(lengths)})")
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    model_legend(figure, look, models)
    means = {task: _best(results, task) for task in tasks}
    words = "; ".join(f"{task} {best}" for task, best in means.items() if best)
    return Drawing(
        figure,
        "RULER's retrieval tasks, each panel one task; the answer tokens must all be right.",
        f"Best model over all lengths: {words}.",
        f"Line charts of needle accuracy against length, one a task. Best models: {words}.",
    )


def _lines(results: Results, task: str) -> Lines:
    found: Lines = {}
    for model in results.models:
        lengths = results.x_values("needle", "accuracy", model=model, task=task)
        if lengths:
            found[model] = [
                Point(x, results.pooled_cell("needle", "accuracy", model=model, task=task, x=x))
                for x in lengths
            ]
    return found


def _panel(
    axes: Axes, lines: Lines, look: Look, task: str, lengths: list[float], mixed: bool
) -> None:
    mark_failures(axes, lines, look)
    for index, (model, points) in enumerate(lines.items()):
        xs = [point.x * sidestep(index, len(lines)) for point in points]
        draw_points(axes, points, look.styles[model], xs=xs, mixed=mixed)
    axes.set_title(task)
    log_x_ticks(axes, lengths)
    axes.set_xlim(min(lengths) / 1.15, max(lengths) * 1.15)
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))


def _best(results: Results, task: str) -> str:
    cells = {
        model: results.pooled_cell("needle", "accuracy", model=model, task=task).value
        for model in results.models
    }
    good = {model: value for model, value in cells.items() if value is not None}
    if not good:
        return ""
    model = max(good, key=lambda name: good[name])
    return f"{model} {share(good[model])}" if good[model] > 0 else "none answers"
