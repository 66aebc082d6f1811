"""Names of lines right of a panel, beside the ends of the lines, without overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes

from ham.report.plots_base import Look


def label_margin(names: Iterable[str]) -> float:
    """Inches that names in bold small type need beside a panel, within reason."""
    return min(2.8, max(1.0, 0.35 + 0.082 * max((len(name) for name in names), default=0)))


def label_line_ends(
    axes: Axes, ends: Mapping[str, tuple[float, float]], look: Look, names: Mapping | None = None
) -> None:
    """Write each model's name right of its line, moved apart where lines end close together.

    Call it when limits are final. `names` gives other texts than the models' names.
    """
    place_labels(
        axes,
        {
            (names or {}).get(model, model): (x, y, look.styles[model].color)
            for model, (x, y) in ends.items()
        },
    )


def place_labels(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write texts right of the panel beside (x, y), without overlaps, joined by thin lines."""
    if not ends:
        return
    # Reading the limits ends lazy autoscaling; setting them keeps the labels beside their lines.
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    figure = axes.get_figure()
    box = axes.get_position()
    height = box.height * figure.get_figheight()
    minimum = 0.155 / height
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = []
    for text, (x, y, color) in ends.items():
        end_x, end_y = to_axes.transform((x, y))
        wanted.append((end_y, end_x, text, color))
    wanted.sort()
    placed = spread_out([min(max(end_y, 0.0), 1.0) for end_y, *_ in wanted], minimum)
    pad = 0.12 / (box.width * figure.get_figwidth())
    for (end_y, end_x, text, color), y in zip(wanted, placed, strict=True):
        axes.plot(
            [end_x, 1 + 0.35 * pad, 1 + pad],
            [end_y, y if end_x > 0.97 else end_y, y],
            transform=axes.transAxes,
            color=color,
            linewidth=0.8,
            alpha=0.55,
            clip_on=False,
            solid_capstyle="round",
        )
        axes.text(
            1 + 1.35 * pad,
            y,
            text,
            transform=axes.transAxes,
            color=color,
            fontsize=8.5,
            fontweight="bold",
            va="center",
        )


def spread_out(positions: Sequence[float], minimum: float) -> list[float]:
    """Sorted positions moved apart to at least `minimum`, kept within 0..1 where they fit.

    Neighbours push each other equally, so that a label stays close to its line.
    """
    placed = list(positions)
    for _ in range(300):
        moved = False
        for index in range(len(placed) - 1):
            lack = minimum - (placed[index + 1] - placed[index])
            if lack > 1e-6:
                placed[index] -= lack / 2
                placed[index + 1] += lack / 2
                moved = True
        if placed and placed[0] < 0.0 and placed[-1] - placed[0] < 1.0:
            placed[0], moved = 0.0, True
        if placed and placed[-1] > 1.0 and placed[-1] - placed[0] < 1.0:
            placed[-1], moved = 1.0, True
        if not moved:
            break
    return placed
