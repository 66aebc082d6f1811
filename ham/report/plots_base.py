"""What every figure shares: size, type, frame, legends, marks of failed cells.

Figures are built with matplotlib's object interface (no pyplot, no global state) at a fixed size,
so that the same rows give the same bytes. A drawing function returns a `Drawing`, or None when its
rows were not run.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from ham.report.aggregate import Point, Results
from ham.report.formats import join_words
from ham.report.palette import GRID, INK, MUTED, PAPER, Style, model_styles

WIDTH_INCHES = 7.6
DPI = 150
# So many of the small print fit the width.
FOOTER_CHARACTERS = 125
# Shapes of one nominal size cover very different areas.
MARKER_SCALE = {
    "*": 1.75,
    "^": 1.15,
    "v": 1.15,
    "<": 1.15,
    ">": 1.15,
    "D": 0.9,
    "p": 1.2,
    "X": 1.2,
    "P": 1.2,
    "H": 1.1,
    "h": 1.1,
}

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.9,
    "svg.hashsalt": "ham-bench",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """What a drawing function needs besides the rows.

    Attributes:
        styles: Colour, marker and dash of each model.
        smoke: Whether the numbers are a smoke run, which every figure then says.
        context: The training context in tokens, or None when unknown.
        targets: Target routed fraction of each arm that has one.
    """

    styles: Mapping[str, Style]
    smoke: bool = False
    context: int | None = None
    targets: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results, **fields: Any) -> Look:
        """The look of all models of `results`."""
        return cls(model_styles(results.models), **fields)


@dataclass
class Drawing:
    """A finished figure and its words.

    Attributes:
        figure: The matplotlib figure.
        shown: First caption line: what is shown.
        note: Second caption line: how to read it, or what to note.
        alt: Text that stands for the picture.
    """

    figure: Figure
    shown: str
    note: str
    alt: str


def style_context() -> Any:
    """A context manager under which figures are drawn and saved."""
    return matplotlib.rc_context(RC)


def new_figure(
    title: str,
    subtitle: str,
    *,
    columns: int = 1,
    rows: int = 1,
    panel_height: float = 3.1,
    left: float = 0.75,
    right: float = 0.3,
    legend: int = 0,
    gap: float = 0.65,
    row_gap: float = 0.75,
    sharey: bool = False,
    footer: str = "",
    titled: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with a title block, panels and a footer, all placed in inches.

    Args:
        title: Bold first line.
        subtitle: Second line: quantity, unit, set.
        columns: Panels side by side.
        rows: Rows of panels.
        panel_height: Height of one panel in inches.
        left: Margin for the axis labels.
        right: Margin for labels at line ends.
        legend: Lines of a legend above the panels, 0 for none.
        gap: Horizontal space between panels.
        row_gap: Vertical space between panels.
        sharey: Whether the panels of a row share their vertical axis.
        footer: Small print below.
        titled: Whether panels have titles of their own.
    """
    top = 0.66 + 0.24 * legend + (0.22 if titled else 0.0)
    small_print = textwrap.wrap(footer, FOOTER_CHARACTERS, break_on_hyphens=False)
    bottom = 0.58 + (0.22 + 0.14 * (len(small_print) - 1) if footer else 0.0)
    height = top + bottom + rows * panel_height + (rows - 1) * row_gap
    figure = Figure(figsize=(WIDTH_INCHES, height))
    panel_width = (WIDTH_INCHES - left - right - (columns - 1) * gap) / columns
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / WIDTH_INCHES,
        right=1 - right / WIDTH_INCHES,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=gap / panel_width,
        hspace=row_gap / panel_height,
    )
    axes = grid.subplots(sharey=sharey, squeeze=False)
    figure.text(0.14 / WIDTH_INCHES, 1 - 0.27 / height, title, fontsize=12, fontweight="bold")
    figure.text(0.14 / WIDTH_INCHES, 1 - 0.49 / height, subtitle, fontsize=9, color=MUTED)
    if footer:
        words = "\n".join(small_print)
        figure.text(0.14 / WIDTH_INCHES, 0.09 / height, words, fontsize=7.5, color=MUTED)
    return figure, [panel for row in axes for panel in row]


def end_series(axes: Axes, xs: Sequence[float], ys: Sequence[float], style: Style) -> None:
    """Draw a long line with few markers."""
    axes.plot(xs, ys, markevery=max(1, len(xs) // 8), **line_style(style, size=5.0))


def save_png(figure: Figure) -> bytes:
    """The figure as PNG, without dates or program names."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save_svg(figure: Figure) -> str:
    """The figure as SVG, without dates."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def line_style(style: Style, size: float = 6.0, **changes: Any) -> dict[str, Any]:
    """Keyword arguments that draw a model's line with markers of one optical size (points)."""
    drawn = {
        "color": style.color,
        "marker": style.marker,
        "markersize": size * MARKER_SCALE.get(style.marker, 1.0),
        "linestyle": style.dash,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
    }
    if style.half:
        # The outline of the empty half must show.
        half = {"fillstyle": "bottom", "markerfacecoloralt": PAPER}
        drawn |= {**half, "markeredgecolor": style.color, "markeredgewidth": 1.0}
    return {**drawn, **changes}


def hollow_style(style: Style, size: float = 6.0) -> dict[str, Any]:
    """Keyword arguments that draw a single hollow marker."""
    outline = {"markeredgecolor": style.color, "markeredgewidth": 1.3}
    return line_style(style, size, linestyle="none", markerfacecolor=PAPER, **outline)


def draw_points(
    axes: Axes,
    points: Sequence[Point],
    style: Style,
    *,
    xs: Sequence[float] | None = None,
    mixed: bool = False,
    hollow: bool = True,
    size: float = 6.0,
    bar_width: float = 1.4,
) -> tuple[float, float] | None:
    """Draw cells as a line with interval bars; returns the last point drawn.

    Cells without a value break the line. `xs` replaces the coordinates of the points. In a figure
    of `mixed` numbers of seeds a cell of one seed has no bar, and a hollow marker if `hollow`.
    `size` is that of markers in points, `bar_width` that of interval bars.
    """
    xs = [point.x for point in points] if xs is None else list(xs)
    ys = [math.nan if p.cell.value is None else p.cell.value for p in points]
    if all(math.isnan(y) for y in ys):
        return None
    axes.plot(xs, ys, **line_style(style, size))
    for x, point in zip(xs, points, strict=True):
        estimate = point.cell.estimate
        if mixed and estimate is not None and estimate.n == 1:
            if hollow:
                axes.plot([x], [estimate.value], **hollow_style(style, size))
        elif estimate is not None and estimate.low is not None and estimate.high is not None:
            ends = [estimate.low, estimate.high]
            axes.plot([x, x], ends, color=style.color, alpha=0.45, linewidth=bar_width)
    return max((x, y) for x, y in zip(xs, ys, strict=True) if not math.isnan(y))


def mark_failures(axes: Axes, lines: Mapping[str, Sequence[Point]], look: Look) -> None:
    """Put an × in the model's colour at the foot of the panel for each failed cell.

    Each model with failures has its own height; long rows of them are thinned.
    """
    across = blended_transform_factory(axes.transData, axes.transAxes)
    slot = 0
    for model, points in lines.items():
        failed = [point.x for point in points if point.cell.status == "failed"]
        if not failed:
            continue
        shown = failed[:: math.ceil(len(failed) / 12)]
        axes.plot(
            shown,
            [0.045 + 0.06 * slot] * len(shown),
            transform=across,
            linestyle="none",
            marker="x",
            markersize=7,
            markeredgewidth=2.2,
            color=look.styles[model].color,
            clip_on=False,
            zorder=5,
        )
        slot += 1


def failed_words(lines: Mapping[str, Sequence[Point]]) -> str:
    """Small print that names the models with failed cells; empty without any."""
    failed = [m for m, points in lines.items() if any(p.cell.status == "failed" for p in points)]
    return f"×: failed ({join_words(failed)})" if failed else ""


def model_title(axes: Axes, model: str, look: Look) -> None:
    """The model's name above its panel, in its colour, small enough to fit."""
    width = axes.get_position().width * axes.get_figure().get_figwidth()
    size = max(6.0, min(9.5, 9.5 * width / (0.092 * len(model) + 0.1)))
    color = look.styles[model].color
    axes.set_title(model, color=color, fontweight="bold", fontsize=size)


def model_legend(figure: Figure, look: Look, models: Sequence[str], failed: bool = False) -> None:
    """A legend above the panels, below the title block; it covers no data."""
    handles = [Line2D([], [], label=model, **line_style(look.styles[model])) for model in models]
    if failed:
        handles.append(
            Line2D([], [], linestyle="none", marker="x", color=MUTED, mew=2.2, label="failed")
        )
    height = figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.08 / WIDTH_INCHES, 1 - 0.57 / height),
        ncol=math.ceil(len(handles) / legend_lines([h.get_label() for h in handles])),
        handlelength=2.2,
        columnspacing=1.4,
        borderpad=0.2,
        labelspacing=0.35,
    )


def legend_lines(labels: Iterable[str]) -> int:
    """Lines that a legend of these labels needs at the figure's width."""
    lengths = [len(label) for label in labels]
    if not lengths:
        return 1
    for lines in range(1, len(lengths) + 1):
        columns = math.ceil(len(lengths) / lines)
        # A column is as wide as its longest entry: 0.068 in a character, 0.55 in for the handle.
        needed = sum(
            0.068 * max(lengths[start : start + lines]) + 0.55
            for start in range(0, len(lengths), lines)
        )
        if needed <= WIDTH_INCHES - 0.2 or columns == 1:
            return lines
    return len(lengths)
