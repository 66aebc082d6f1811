"""Figures of recall: needle heat maps, share of needle tokens kept, key-value pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from ham.report.aggregate import Cell, Point, Results
from ham.report.formats import cell_text, share, token_labels, token_unit
from ham.report.palette import GRID, MUTED
from ham.report.plots_axes import log_x_ticks
from ham.report.plots_base import (
    Drawing,
    Look,
    draw_points,
    failed_words,
    mark_failures,
    model_title,
    new_figure,
)
from ham.report.plots_labels import label_line_ends, label_margin
from ham.report.plots_seeds import footer_text, interval_words, line_cells, mixed_seeds
from ham.report.rows import Row

COLUMNS = 3
# So far apart that interval bars of models with equal accuracy stay visible; all of them together
# so close that a point stands by its tick.
WIDEST_OCTAVES = 0.24
# Written on dark and on light cells; neither may equal a colour that the page recolours.
LIGHT_TEXT, DARK_TEXT = "#fefefe", "#101010"


def needle_accuracy(results: Results, look: Look) -> Drawing | None:
    """Needle accuracy over length and depth, one heat map a model."""
    return _heat_maps(
        results,
        look,
        metric="accuracy",
        title="Needle in a haystack",
        subtitle="share of needles whose answer is wholly right",
        shown="Each square is one haystack length (across) and needle depth (down; 0 % is the "
        "start of the text).",
    )


def needle_kept(results: Results, look: Look) -> Drawing | None:
    """Share of the needle's tokens that were routed, one heat map a routing model."""
    return _heat_maps(
        results,
        look,
        metric="kept_fraction",
        title="Was the needle kept?",
        subtitle="share of the needle's tokens that entered the KV cache, mean over layers",
        shown="For models that route: how much of the needle itself the router wrote to the "
        "cache, by length (across) and depth (down).",
    )


def _heat_maps(
    results: Results, look: Look, *, metric: str, title: str, subtitle: str, shown: str
) -> Drawing | None:
    rows = results.find("needle", metric, keep=_has_depth)
    if not any(row.value is not None for row in rows):
        return None
    models = [m for m in results.models if any(row.model == m for row in rows)]
    lengths = results.x_values("needle", metric, keep=_has_depth)
    depths = results.label_values("needle", metric, "depth")
    tasks = {row.task for row in rows}
    if len(tasks) > 1:
        subtitle += f", mean over {len(tasks)} tasks"
    columns = min(COLUMNS, len(models))
    figure, panels = new_figure(
        title,
        subtitle,
        columns=columns,
        rows=math.ceil(len(models) / columns),
        panel_height=max(1.3, 0.27 * len(depths) + 0.1),
        left=0.7,
        right=1.0,
        gap=0.3,
        row_gap=0.72,
        titled=True,
        footer=footer_text(results, look, "hatched: failed", "blank: not run"),
    )
    image = None
    for index, (axes, model) in enumerate(zip(panels, models, strict=False)):
        grid = [
            [results.pooled_cell("needle", metric, model=model, x=x, depth=d) for x in lengths]
            for d in depths
        ]
        image = _heat_panel(axes, grid, lengths, depths)
        model_title(axes, model, look)
        if index % columns:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("needle depth")
        if index >= len(models) - columns:
            axes.set_xlabel(f"length ({token_unit(lengths)})")
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    _color_bar(figure, panels[columns - 1], image)
    means = {m: results.pooled_cell("needle", metric, model=m, keep=_has_depth) for m in models}
    words = "; ".join(f"{m} {cell_text(means[m], share)}" for m in models)
    return Drawing(
        figure,
        shown,
        f"Brighter is more. Mean over all squares: {words}.",
        f"Heat maps over length and depth. Mean over all squares: {words}.",
    )


def _has_depth(row: Row) -> bool:
    return "depth" in row.labels


def _heat_panel(
    axes: Axes, grid: list[list[Cell]], lengths: list[float], depths: list[float]
) -> object:
    values = np.array([[_or_nan(cell.value) for cell in line] for line in grid])
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    small = len(lengths) > 5 or len(depths) > 8
    for y, line in enumerate(grid):
        for x, cell in enumerate(line):
            if cell.value is not None:
                color = LIGHT_TEXT if cell.value < 0.6 else DARK_TEXT
                axes.text(
                    x,
                    y,
                    f"{cell.value * 100:.0f}",
                    ha="center",
                    va="center",
                    color=color,
                    fontsize=6.5 if small else 8,
                )
            elif cell.status == "failed":
                axes.add_patch(
                    Rectangle(
                        (x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=MUTED, lw=0
                    )
                )
    write = token_labels(lengths)
    axes.set_xticks(range(len(lengths)), [write(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth * 100:.0f} %" for depth in depths])
    if len(lengths) > 5:
        axes.tick_params(axis="x", rotation=45)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set(visible=True, color=GRID)
    return image


def _color_bar(figure: object, last: Axes, image: object) -> None:
    box = last.get_position()
    axes = figure.add_axes((box.x1 + 0.022, box.y0, 0.018, box.height))
    bar = figure.colorbar(image, cax=axes, format=FuncFormatter(lambda v, _: f"{v * 100:.0f} %"))
    bar.outline.set_visible(False)
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def recall_pairs(results: Results, look: Look) -> Drawing | None:
    """Accuracy of key-value recall against the number of pairs."""
    lines = {m: results.series("recall", "accuracy", model=m) for m in results.models}
    lines = {model: points for model, points in lines.items() if points}
    if not any(p.cell.value is not None for points in lines.values() for p in points):
        return None
    cells = line_cells(lines)
    figure, (axes,) = new_figure(
        "Associative recall",
        "share of queried keys whose value is right",
        right=label_margin(lines),
        footer=footer_text(results, look, interval_words(cells), failed_words(lines), cells=cells),
    )
    ends = {}
    mark_failures(axes, lines, look)
    mixed = mixed_seeds(cells)
    for index, (model, points) in enumerate(lines.items()):
        aside = sidestep(index, len(lines))
        xs = [point.x * aside for point in points]
        end = draw_points(axes, points, look.styles[model], xs=xs, mixed=mixed)
        if end is not None:
            ends[model] = end
    log_x_ticks(axes, results.x_values("recall", "accuracy"))
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.05, right * 1.05)
    axes.set_ylim(*_accuracy_limits(lines))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.set_xlabel("key-value pairs in the context")
    axes.set_ylabel("accuracy")
    label_line_ends(axes, ends, look)
    hardest = max(p.x for ps in lines.values() for p in ps if p.cell.value is not None)
    at_end = {m: p.cell.value for m, ps in lines.items() for p in ps if p.x == hardest}
    at_end = {model: value for model, value in at_end.items() if value is not None}
    best = max(at_end, key=lambda model: at_end[model])
    words = "; ".join(f"{model} {share(value)}" for model, value in at_end.items())
    return Drawing(
        figure,
        "Key-value pairs are listed once and then queried; the value must be recalled exactly.",
        f"Further right is harder. With {hardest:,.0f} pairs {best} is best "
        f"({share(at_end[best])}).",
        f"Line chart of recall accuracy against pairs. With {hardest:,.0f} pairs: {words}.",
    )


def sidestep(index: int, count: int, widest: float = WIDEST_OCTAVES) -> float:
    """The factor by which the points of one of `count` models stand aside of their coordinate.

    All models together take `widest` octaves at most.
    """
    step = min(widest / 8, widest / max(1, count - 1))
    return 2.0 ** (step * (index - (count - 1) / 2))


def _accuracy_limits(lines: Mapping[str, Sequence[Point]]) -> tuple[float, float]:
    """From 0 to above the highest interval; never beyond 100 %."""
    estimates = [p.cell.estimate for points in lines.values() for p in points]
    tops = [e.value if e.high is None else e.high for e in estimates if e is not None]
    high = min(1.02, max(0.1, 1.15 * max(tops)))
    return -0.02 * high, high
