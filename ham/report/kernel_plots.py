"""Bars of kernel times: a group for each size, a bar for each provider, a mark at the floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ham.report.formats import join_words, share, significant
from ham.report.kernel_cells import (
    EAGER,
    GRAPH,
    MODE_WORDS,
    OPERATION_WORDS,
    PROVIDERS,
    Place,
    SpeedRows,
    label,
)
from ham.report.palette import EXTRA_COLORS, INK, MUTED
from ham.report.plots_axes import log_y_plain
from ham.report.plots_base import (
    WIDTH_INCHES,
    Drawing,
    legend_lines,
    new_figure,
)
from ham.report.rows import Row

DRAWN_MODES = ("forward", "forward_backward")
COLORS = {
    "triton": "#d55e00",
    "torch": "#b5b5b5",
    "reference": "#7a7a7a",
    "flash_qla": "#009e73",
    "fla": "#0072b2",
    "mamba_ssm": "#cc79a7",
    "flex_prepacked": "#56b4e9",
    "flex": "#0072b2",
    "flex_masked": "#9b2f6a",
    "sdpa_cudnn": "#e69f00",
    "sdpa_flash": "#a89a00",
    "argsort": "#6a5acd",
}
GROUP_WIDTH = 0.84
# A logarithmic axis where the slowest bar is this many times as high as the fastest.
LOG_RATIO = 8.0
VALUE_SIZE = 6.0


def color_of(provider: str) -> str:
    """The colour of a provider in every figure."""
    return COLORS.get(provider, EXTRA_COLORS[len(provider) % len(EXTRA_COLORS)])


def operation_figure(rows: SpeedRows, operation: str) -> Drawing | None:
    """Times of an operation, forward above forward + backward; None without any time."""
    places = [place for place in rows.places if place.operation == operation]
    modes = [mode for mode in DRAWN_MODES if any(_bars(rows, place, mode) for place in places)]
    if not modes:
        return None
    drawn = {
        provider for place in places for mode in modes for provider in _bars(rows, place, mode)
    }
    providers = [name for name in PROVIDERS if name in drawn] + sorted(drawn.difference(PROVIDERS))
    wrong = any(
        row.correct is not True
        for place in places
        for mode in modes
        for row in _bars(rows, place, mode).values()
    )
    names = [*providers, "floor", *(["wrong or not compared"] if wrong else [])]
    figure, panels = new_figure(
        f"{OPERATION_WORDS.get(operation, operation)}: time of a call",
        f"milliseconds, median; {_launch_words(rows, places, modes)}; lower is better",
        rows=len(modes),
        panel_height=2.7,
        row_gap=0.85,
        legend=legend_lines(names),
        titled=True,
        footer=" · ".join(rows.devices),
    )
    for panel, mode in zip(panels, modes, strict=True):
        _draw_panel(panel, rows, places, mode, providers)
    _legend(figure, providers, wrong)
    return Drawing(
        figure,
        f"Times of {join_words(providers)}.",
        "Black marks are floors: the least time that measured rates of the device allow.",
        _alternative(rows, places, modes, providers),
    )


def _bars(rows: SpeedRows, place: Place, mode: str) -> dict[str, Row]:
    """The times to draw, by provider: replays of a graph where there are any, else eager calls."""
    found = {}
    for provider in rows.providers(place):
        for launch_mode in (GRAPH, EAGER):
            row = rows.find(place, provider, f"{mode}_ms", launch_mode)
            if row is not None and row.value is not None:
                found[provider] = row
                break
    return found


def _launch_words(rows: SpeedRows, places: Sequence[Place], modes: Sequence[str]) -> str:
    launched = {
        row.launch_mode for p in places for mode in modes for row in _bars(rows, p, mode).values()
    }
    if launched == {EAGER}:
        return "eager calls"
    return "CUDA graphs" if launched == {GRAPH} else "CUDA graphs, eager where there is none (°)"


def _draw_panel(
    axes: Axes, rows: SpeedRows, places: Sequence[Place], mode: str, providers: Sequence[str]
) -> None:
    shown = [place for place in places if _bars(rows, place, mode)]
    values = []
    mixed = "°" in _launch_words(rows, places, DRAWN_MODES)
    for index, place in enumerate(shown):
        bars = _bars(rows, place, mode)
        present = [name for name in providers if name in bars]
        width = GROUP_WIDTH / max(len(present), 3)
        start = index - width * (len(present) - 1) / 2
        for slot, name in enumerate(present):
            row, x = bars[name], start + slot * width
            value = row.value or 0.0
            values.append(value)
            axes.bar(
                x,
                value,
                width * 0.9,
                color=color_of(name),
                hatch=None if row.correct is True else "////",
                edgecolor="white",
                linewidth=0.0,
            )
            mark = "°" if mixed and row.launch_mode == EAGER else ""
            axes.annotate(
                significant(value) + mark,
                (x, value),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=VALUE_SIZE,
                rotation=90,
                color=MUTED,
            )
        floor = next((label(row, "floor_ms") for row in bars.values()), None)
        if floor:
            ends = (start - width * 0.6, start + width * (len(present) - 0.4))
            axes.plot(ends, (floor, floor), color=INK, linewidth=1.3)
            values.append(floor)
    axes.set_title(MODE_WORDS[mode])
    axes.set_xticks(range(len(shown)), [_place_words(place) for place in shown])
    axes.tick_params(axis="x", labelsize=7.0 if len(shown) > 4 else 8.0, length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("ms")
    _scale(axes, values)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Room for the numbers above the bars; logarithmic where a linear axis would hide the small."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_RATIO:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.8, high * (high / low) ** 0.28 * 1.2)
        log_y_plain(axes)
    else:
        axes.set_ylim(0, high * 1.25)


def _place_words(place: Place) -> str:
    parts = place.shape.split("_")
    lines = [" ".join(parts[:2]), " ".join(parts[2:])]
    if place.routed is not None:
        lines.append("all routed" if math.isclose(place.routed, 1.0) else share(place.routed))
    return "\n".join(lines)


def _legend(figure: object, providers: Sequence[str], wrong: bool) -> None:
    handles: list = [Patch(color=color_of(name), label=name) for name in providers]
    handles.append(Line2D([], [], color=INK, linewidth=1.3, label="floor"))
    if wrong:
        handles.append(
            Patch(
                facecolor="#cccccc", edgecolor="white", hatch="////", label="wrong or not compared"
            )
        )
    height = figure.get_figheight()  # type: ignore[attr-defined]
    lines = legend_lines([handle.get_label() for handle in handles])
    figure.legend(  # type: ignore[attr-defined]
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.08 / WIDTH_INCHES, 1 - 0.57 / height),
        ncol=math.ceil(len(handles) / lines),
        handlelength=1.4,
        columnspacing=1.4,
        borderpad=0.2,
        labelspacing=0.35,
    )


def _alternative(
    rows: SpeedRows, places: Sequence[Place], modes: Sequence[str], providers: Sequence[str]
) -> str:
    """The fastest provider of each group, in words."""
    words = []
    for mode in modes:
        for place in places:
            bars = {name: row.value or 0.0 for name, row in _bars(rows, place, mode).items()}
            if bars:
                best = min(sorted(bars), key=lambda name: bars[name])
                where = " ".join(_place_words(place).split())
                words.append(f"{MODE_WORDS[mode]} {where}: {best} {significant(bars[best])} ms")
    return f"Bars of {len(providers)} providers. Fastest: {'; '.join(words)}."
