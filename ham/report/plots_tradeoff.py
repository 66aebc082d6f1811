"""Quality against the bytes that a model decodes with: which arms no other one beats at both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ham.report.aggregate import Cell, Results
from ham.report.formats import bits, byte_size, cell_text, join_words, share, short_bytes
from ham.report.palette import MUTED
from ham.report.plots_base import (
    Drawing,
    Look,
    footer_text,
    legend_lines,
    line_style,
    model_legend,
    new_figure,
)
from ham.report.plots_cost import cache_cell
from ham.report.plots_language import quality_cell


@dataclass(frozen=True)
class Quality:
    """One vertical axis.

    Attributes:
        title: Name and unit.
        cell: The value of a model.
        write: Writes a value.
        lower_is_better: Else higher is.
    """

    title: str
    cell: Callable[[Results, Look, str], Cell]
    write: Callable[[float], str]
    lower_is_better: bool = False


def memory_context(results: Results) -> float | None:
    """The longest context at which decoding memory was measured."""
    return max(results.x_values("memory", "cache_bytes_allocated"), default=None)


def memory_cell(results: Results, look: Look, model: str) -> Cell:
    """Bytes of a model's decoding memory; where it was not measured, those of its own dial."""
    context = memory_context(results)
    measured = cache_cell(results, model, context)
    if measured.value is not None or model not in look.targets:
        return measured
    where = {"model": model, "x": look.targets[model], "context": context}
    return results.cell("dial", "cache_bytes_allocated", **where)


def hardest_recall(results: Results, look: Look, model: str) -> Cell:
    """Accuracy with the most pairs, where models differ most."""
    pairs = max(results.x_values("recall", "accuracy"), default=None)
    return results.cell("recall", "accuracy", model=model, x=pairs)


def needle_mean(results: Results, look: Look, model: str) -> Cell:
    """Needle accuracy over the whole grid."""
    return results.pooled_cell("needle", "accuracy", model=model)


QUALITIES = (
    Quality("bits per byte (lower is better)", quality_cell, bits, lower_is_better=True),
    Quality("recall with the most pairs", hardest_recall, share),
    Quality("needle accuracy", needle_mean, share),
)


def pareto(results: Results, look: Look) -> Drawing | None:
    """A panel for each quality, a marker for each model, a line along those that none beats."""
    memory = {model: memory_cell(results, look, model) for model in results.models}
    memory = {model: cell for model, cell in memory.items() if cell.value is not None}
    panels = []
    for quality in QUALITIES:
        cells = {model: quality.cell(results, look, model) for model in memory}
        cells = {model: cell for model, cell in cells.items() if cell.value is not None}
        if len(cells) > 1:
            panels.append((quality, cells))
    if not panels:
        return None
    named = [model for model in memory if any(model in cells for _, cells in panels)]
    context = memory_context(results)
    figure, axes = new_figure(
        "Quality against decoding memory",
        f"bytes of cache and state after {context:,.0f} tokens; left is cheaper",
        columns=len(panels),
        panel_height=2.5,
        gap=0.75,
        left=0.75,
        legend=legend_lines(named),
        footer=footer_text(results, look, "line: models that none beats in memory and quality"),
    )
    words = []
    for panel, (quality, cells) in zip(axes, panels, strict=True):
        best = frontier(memory, cells, quality.lower_is_better)
        _panel(panel, look, quality, memory, cells, best)
        shown = join_words(
            [
                f"{model} ({byte_size(memory[model].value)}, "
                f"{cell_text(cells[model], quality.write)})"
                for model in best
            ]
        )
        words.append(f"{quality.title}: {shown}")
    model_legend(figure, look, named)
    return Drawing(
        figure,
        "Each marker is a model: what it decodes with, and how good it is. Bars are intervals over "
        "seeds. A model is on the line if no other needs as little and does as well.",
        f"On the line, by mean values: {'; '.join(words)}.",
        f"Scatter plots of quality against decoding memory. On the line: {'; '.join(words)}.",
    )


def frontier(
    memory: Mapping[str, Cell], cells: Mapping[str, Cell], lower_is_better: bool
) -> list[str]:
    """Models that are better than every one with as little memory, from the smallest memory up."""
    sign = 1 if lower_is_better else -1
    order = sorted(cells, key=lambda name: (memory[name].value, sign * (cells[name].value or 0.0)))
    found: list[str] = []
    for model in order:
        value = sign * (cells[model].value or 0.0)
        if not found or value < sign * (cells[found[-1]].value or 0.0):
            found.append(model)
    return found


def _panel(
    axes: Axes,
    look: Look,
    quality: Quality,
    memory: Mapping[str, Cell],
    cells: Mapping[str, Cell],
    best: list[str],
) -> None:
    points = [(memory[model].value, cells[model].value) for model in best]
    axes.plot(*zip(*points, strict=True), color=MUTED, linewidth=1.0, zorder=1)
    for model, cell in cells.items():
        style, estimate = look.styles[model], cell.estimate
        place = memory[model].value
        # One seed's interval is over documents, which all models share: another thing, and wider.
        if estimate is not None and estimate.low is not None and len(cell.by_seed) > 1:
            ends = [estimate.low, estimate.high]
            axes.plot([place, place], ends, color=style.color, alpha=0.35, linewidth=2)
        axes.plot([place], [cell.value], **line_style(style, linestyle="none", size=7.5))
    if all(memory[model].value > 0 for model in cells):
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_locator(LogLocator(base=4))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quality.write(value)))
    axes.set_xlabel("decoding memory")
    axes.set_title(quality.title)
    if not quality.lower_is_better:
        axes.set_ylim(-0.03, 1.03)
