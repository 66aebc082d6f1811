"""Quality against the bytes that a model decodes with: which arms no other one beats at both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ham.report.aggregate import Cell, Results
from ham.report.formats import bits, byte_size, cell_text, join_words, share, short_bytes
from ham.report.palette import MUTED
from ham.report.plots_base import (
    Drawing,
    Look,
    hollow_style,
    legend_lines,
    line_style,
    model_legend,
    new_figure,
)
from ham.report.plots_cost import cache_cell
from ham.report.plots_language import quality_cell
from ham.report.plots_seeds import HOLLOW_WORDS, footer_text, mixed_seeds, seed_counts

JOINED_SEEDS = 3
"""With fewer, an interval says little, and a line would rank noise."""


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
    numbered, complete = set(memory), set(memory)
    for quality in QUALITIES:
        found = {model: quality.cell(results, look, model) for model in results.models}
        found = {model: cell for model, cell in found.items() if cell.value is not None}
        cells = {model: cell for model, cell in found.items() if model in memory}
        if len(cells) > 1:
            panels.append((quality, cells))
            numbered |= found.keys()
            complete &= cells.keys()
    if not panels:
        return None
    named = [model for model in memory if any(model in cells for _, cells in panels)]
    context = memory_context(results)
    every = [cell for _, cells in panels for cell in cells.values()]
    absent = [model for model in results.models if model in numbered - complete]
    missing = f"without a number for every panel: {join_words(absent)}" if absent else ""
    figure, axes = new_figure(
        "Quality against decoding memory",
        f"bytes of cache and state after {context:,.0f} tokens; left is cheaper",
        columns=len(panels),
        panel_height=2.8,
        gap=0.75,
        left=0.75,
        legend=legend_lines(named),
        footer=footer_text(results, look, _seeds_words(every), missing, cells=every),
    )
    mixed = mixed_seeds(every)
    words = []
    for panel, (quality, cells) in zip(axes, panels, strict=True):
        best = frontier(memory, joined(cells), quality.lower_is_better)
        _panel(panel, look, quality, memory, cells, best, mixed)
        shown = join_words(
            [
                f"{model} ({byte_size(memory[model].value)}, "
                f"{cell_text(cells[model], quality.write)})"
                for model in best
            ]
        )
        words.append(f"{quality.title}: {shown or 'none'}")
    model_legend(figure, look, named)
    return Drawing(
        figure,
        "Each marker is a model: what it decodes with, and how good it is. Bars are intervals over "
        f"seeds. A model is on the line if it has {JOINED_SEEDS} seeds or more and no other such "
        "model needs as little and does as well.",
        f"On the line, by mean values: {'; '.join(words)}.",
        f"Scatter plots of quality against decoding memory. On the line: {'; '.join(words)}.",
    )


def joined(cells: Mapping[str, Cell]) -> dict[str, Cell]:
    """Models with so many seeds that a line may say of them which are best."""
    return {
        model: cell
        for model, cell in cells.items()
        if cell.estimate is not None and cell.estimate.n >= JOINED_SEEDS
    }


def _seeds_words(cells: Sequence[Cell]) -> str:
    """What the line and hollow markers mean, as far as there are any."""
    counts = seed_counts(cells)
    line = f"line: models of {JOINED_SEEDS} seeds or more that none of these beats in both"
    words = [line] if counts and counts[-1] >= JOINED_SEEDS else []
    return " · ".join([*words, HOLLOW_WORDS] if mixed_seeds(cells) else words)


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
    mixed: bool,
) -> None:
    points = [(memory[model].value, cells[model].value) for model in best]
    if points:
        axes.plot(*zip(*points, strict=True), color=MUTED, linewidth=1.0, zorder=1)
    for model, cell in cells.items():
        style, estimate = look.styles[model], cell.estimate
        place = memory[model].value
        # One seed's interval is over documents, which all models share: another thing, and wider.
        if estimate is not None and estimate.low is not None and len(cell.by_seed) > 1:
            ends = [estimate.low, estimate.high]
            axes.plot([place, place], ends, color=style.color, alpha=0.35, linewidth=2)
        alone = mixed and len(cell.by_seed) == 1
        shape = hollow_style(style, 7.5) if alone else line_style(style, 7.5, linestyle="none")
        axes.plot([place], [cell.value], **shape)
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
