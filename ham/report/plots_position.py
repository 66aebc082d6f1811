"""Figure of the loss by position in the context, with the models that stay low enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from matplotlib.axes import Axes

from ham.report.aggregate import Point, Results
from ham.report.formats import bits
from ham.report.palette import MUTED
from ham.report.plots_base import (
    Drawing,
    Look,
    draw_points,
    failed_words,
    line_style,
    mark_failures,
    new_figure,
)
from ham.report.plots_labels import label_line_ends, label_margin
from ham.report.plots_seeds import footer_text, interval_words, line_cells, mixed_seeds

FLATTENED = 4
"""A figure is enlarged where its range is so many times that of the median model."""

Lines = Mapping[str, list[Point]]


def loss_by_position(results: Results, look: Look) -> Drawing | None:
    """Loss against the position in the context, and beyond the training context."""
    metric, unit = "position_bits_per_byte", "bits per byte"
    if not results.find("language_modelling", metric):
        metric, unit = "loss_nats", "nats per token"
    context = _position_context(results, look)
    lines = {
        model: results.series("language_modelling", metric, model=model, keep=context[1])
        for model in results.models
    }
    lines = {model: points for model, points in lines.items() if points}
    if not any(p.cell.value is not None for points in lines.values() for p in points):
        return None
    zoom = zoom_limits(lines)
    figure, (axes, *enlarged) = new_figure(
        "Loss by position in the context",
        f"test documents, {unit}{context[0]}" + ("; below enlarged, without bars" if zoom else ""),
        rows=2 if zoom else 1,
        panel_height=2.6 if zoom else 3.1,
        right=label_margin(lines),
        footer=footer_text(
            results,
            look,
            interval_words(line_cells(lines)),
            failed_words(lines),
            cells=line_cells(lines),
        ),
    )
    ends, firsts = {}, {}
    mixed = mixed_seeds(line_cells(lines))
    mark_failures(axes, lines, look)
    for model, points in lines.items():
        end = draw_points(axes, points, look.styles[model], mixed=mixed)
        if end is not None:
            ends[model] = end
            firsts[model] = next(p.cell.value for p in points if p.cell.value is not None)
    beyond = _finish(axes, lines, look, unit)
    named = ends
    if zoom:
        _draw_enlarged(enlarged[0], lines, look, zoom)
        _finish(enlarged[0], lines, look, unit)
        label_line_ends(enlarged[0], {m: e for m, e in ends.items() if e[1] <= zoom[1]}, look)
        named = {model: end for model, end in ends.items() if end[1] > zoom[1]}
    label_line_ends(axes, named, look)
    gains = {model: firsts[model] - ends[model][1] for model in ends}
    most = max(gains, key=lambda model: gains[model])
    return Drawing(
        figure,
        "Mean loss of the tokens at each distance from the start of the context." + beyond,
        "A line that keeps falling uses the far context. From the first to the last bin "
        f"{most} gains most ({bits(gains[most])} {_unit_word(unit)}).",
        f"Line chart of loss against position. Gain from first to last bin in {_unit_word(unit)}: "
        + "; ".join(f"{model} {bits(gains[model])}" for model in gains)
        + ".",
    )


def zoom_limits(lines: Lines) -> tuple[float, float] | None:
    """Limits that show most models, where a few with a far higher loss flatten them."""
    values = {
        model: [point.cell.value for point in points if point.cell.value is not None]
        for model, points in lines.items()
    }
    highest = [max(found) for found in values.values() if found]
    lowest = min(min(found) for found in values.values() if found)
    usual = median(highest) - lowest
    if len(highest) < 3 or max(highest) - lowest <= FLATTENED * usual:
        return None
    return lowest - 0.08 * usual, lowest + 1.8 * usual


def _draw_enlarged(axes: Axes, lines: Lines, look: Look, limits: tuple[float, float]) -> None:
    for model, points in lines.items():
        good = [(p.x, p.cell.value) for p in points if p.cell.value is not None]
        if good:
            axes.plot(*zip(*good, strict=True), **line_style(look.styles[model], 5.0))
    axes.set_ylim(*limits)


def _finish(axes: Axes, lines: Lines, look: Look, unit: str) -> str:
    """Words at the axes and the mark of the training context; returns words on it."""
    axes.set_xlabel("position in the context (tokens, bin centres)")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_xlim(0, None)
    return _mark_training_context(axes, lines, look)


def _unit_word(unit: str) -> str:
    return unit.removesuffix(" per token")


def _mark_training_context(axes: Axes, lines: Lines, look: Look) -> str:
    """A line where training ended, if positions beyond it were read; returns words on it."""
    furthest = max(points[-1].x for points in lines.values())
    if look.context is None or furthest < look.context:
        return ""
    axes.axvline(look.context, color=MUTED, linestyle=":", linewidth=1.5)
    return f" Dotted: the training context, {look.context:,} tokens."


def _position_context(results: Results, look: Look) -> tuple[str, object]:
    """Words for the subtitle and a filter of rows: the longest context that was binned."""
    contexts = results.label_values("language_modelling", "loss_nats", "context")
    if not contexts:
        return "", None
    longest = contexts[-1]
    return f", context {longest:,}", lambda row: row.labels.get("context") == longest
