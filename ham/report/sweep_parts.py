"""Where the time of a decode step goes: a stacked bar for each model and size."""

from __future__ import annotations

import math

from matplotlib.patches import Patch

from ham.measure.sweep.grid import DECODE_PART
from ham.report.formats import significant, token_labels
from ham.report.palette import MUTED
from ham.report.plots_base import WIDTH_INCHES, Drawing, legend_lines, new_figure
from ham.report.sweep_cells import Series, SweepRows, order_parts

# Parts of the mixer warm, the rest of the block cool.
COLORS = {
    "recurrent": "#d55e00",
    "core": "#e8874a",
    "score": "#f0b088",
    "append": "#cc79a7",
    "attention": "#e69f00",
    "gates": "#a89a00",
    "projections": "#0072b2",
    "mlp": "#56b4e9",
    "norms": "#009e73",
    "head": "#7a7a7a",
}
OTHER = "#b5b5b5"


def parts_figure(rows: SweepRows) -> Drawing | None:
    """Stacked bars, one panel for each context and batch; None without any part."""
    bars: dict[tuple[int, int], list[tuple[Series, dict[str, float], float]]] = {}
    for place, series, row in rows.cells(DECODE_PART):
        parts = rows.parts(place, series)
        times = {name: part.value for name, part in parts.items() if part.value is not None}
        if times and row.value is not None:
            bars.setdefault((place.context, place.batch), []).append((series, times, row.value))
    if not bars:
        return None
    present = {name for group in bars.values() for _, times, _ in group for name in times}
    names = order_parts(present)
    handles = [Patch(color=COLORS.get(name, OTHER), label=name) for name in names]
    legend = [*names, "whole step"]
    figure, panels = new_figure(
        "Where the time of a decode step goes",
        "milliseconds of each part alone, stacked; the mark is the whole step",
        rows=len(bars),
        panel_height=0.45 + 0.33 * max(len(group) for group in bars.values()),
        left=1.45,
        row_gap=0.85,
        legend=legend_lines(legend),
        titled=True,
        footer=" · ".join(rows.devices),
    )
    write = token_labels(context for context, _ in bars)
    for axes, ((context, batch), group) in zip(panels, bars.items(), strict=True):
        for index, (_, times, whole) in enumerate(group):
            left = 0.0
            for name in names:
                width = times.get(name, 0.0)
                axes.barh(index, width, 0.62, left, color=COLORS.get(name, OTHER))
                left += width
            axes.plot([whole] * 2, [index - 0.42, index + 0.42], color=MUTED, linewidth=1.6)
        axes.set_yticks(range(len(group)), [series.name for series, _, _ in group])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{write(context)} tokens, batch {batch}")
        axes.set_xlabel("ms")
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.08 / WIDTH_INCHES, 1 - 0.57 / figure.get_figheight()),
        ncol=math.ceil(len(handles) / legend_lines(legend)),
        handlelength=1.4,
        columnspacing=1.4,
        borderpad=0.2,
        labelspacing=0.35,
    )
    return Drawing(
        figure,
        "Times of the parts of a decode step, each run alone for all layers.",
        "A mark right of its bar is time between the parts, left of it what they share.",
        f"Stacked bars. Largest part: {_largest(bars)}.",
    )


def _largest(bars: dict) -> str:
    words = []
    for (context, batch), group in bars.items():
        for series, times, _ in group:
            name = max(times, key=lambda one: times[one])
            where = f"{series.name} at {context:,} tokens, batch {batch}"
            words.append(f"{where}: {name} {significant(times[name])} ms")
    return "; ".join(words)
