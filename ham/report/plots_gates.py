"""Figure of the gates: how far each layer opens its two memories."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ham.report.aggregate import Results
from ham.report.formats import bits, join_words
from ham.report.palette import MUTED
from ham.report.plots_base import Drawing, Look, model_title, new_figure
from ham.report.plots_labels import place_labels
from ham.report.plots_seeds import footer_text
from ham.report.tables_routing import BRANCHES

MOST_COLUMNS = 3


def gates(results: Results, look: Look) -> Drawing | None:
    """Mean gates by layer, one panel a model: recurrent in grey, attention in its colour."""
    means = {
        model: {branch: _mean(results, model, branch) for branch in BRANCHES}
        for model in results.models
    }
    means = {model: parts for model, parts in means.items() if None not in parts.values()}
    if not means:
        return None
    columns = min(MOST_COLUMNS, len(means))
    figure, panels = new_figure(
        "Gates of both memories",
        "mean over held-out tokens and heads by layer; 0 is shut, 1 open",
        columns=columns,
        rows=math.ceil(len(means) / columns),
        panel_height=2.3,
        right=0.95,
        gap=1.35,
        titled=True,
        footer=footer_text(
            results, look, "bands: 5 % to 95 % of the gates of all tokens and heads"
        ),
    )
    for axes, model in zip(panels, means, strict=False):
        _panel(axes, results, look, model)
    for axes in panels[len(means) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("gate")
    return Drawing(
        figure,
        "How far each layer opens its recurrent memory (grey) and its attention over kept tokens.",
        "A gate near 0 would mean that a memory is not used. " + _words(results, means),
        f"Line charts of mean gates by layer. {_words(results, means)}",
    )


def _mean(results: Results, model: str, branch: str) -> float | None:
    """Over layers and seeds; all layers saw the same tokens."""
    return results.pooled_cell("gates", "gate_mean", model=model, branch=branch).value


def _panel(axes: Axes, results: Results, look: Look, model: str) -> None:
    style, ends = look.styles[model], {}
    for branch, title in BRANCHES.items():
        color = style.color if branch == "attention" else MUTED
        where = {"model": model, "branch": branch}
        low, high = (results.series("gates", name, **where) for name in ("gate_p5", "gate_p95"))
        known = [
            (a.x, a.cell.value, b.cell.value)
            for a, b in zip(low, high, strict=True)
            if a.cell.value is not None and b.cell.value is not None
        ]
        if known:
            axes.fill_between(*zip(*known, strict=True), color=color, alpha=0.13, linewidth=0)
        points = results.series("gates", "gate_mean", **where)
        good = [(point.x, point.cell.value) for point in points if point.cell.value is not None]
        axes.plot(*zip(*good, strict=True), color=color, marker=style.marker, markersize=4.5)
        ends[title] = (*good[-1], color)
    axes.set_ylim(0, 1)
    model_title(axes, model, look)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.05)
    place_labels(axes, ends)


def _words(results: Results, means: dict[str, dict[str, float]]) -> str:
    parts = []
    for model, mean in means.items():
        points = results.series("gates", "gate_mean", model=model, branch="attention")
        values = [point.cell.value for point in points if point.cell.value is not None]
        parts.append(
            f"{model} opens attention by {bits(mean['attention'])} (layers {bits(min(values))} to "
            f"{bits(max(values))}) and the recurrent memory by {bits(mean['recurrent'])}"
        )
    return f"On average {join_words(parts)}."
