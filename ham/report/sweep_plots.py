"""Figures of a sweep against context: decode speed, memory, HAM over transformer, training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from ham.measure.sweep.grid import UNSTRUCTURED
from ham.report.formats import byte_size, significant, token_unit
from ham.report.palette import MUTED
from ham.report.plots_axes import log_x_ticks, log_y_bytes, log_y_plain, log_y_rate, pad_log
from ham.report.plots_base import (
    WIDTH_INCHES,
    Drawing,
    legend_lines,
    line_style,
    new_figure,
)
from ham.report.rows import Row
from ham.report.sweep_cells import (
    HAM,
    TRANSFORMER,
    Series,
    SweepRows,
    number,
    series_styles,
)
from ham.report.sweep_targets import crossing_context

Lines = dict[Series, list[Row]]
DENSE = Series(TRANSFORMER)


def sweep_figures(rows: SweepRows) -> dict[str, Drawing]:
    """Every figure that has something to show, by name."""
    drawings: dict[str, Drawing | None] = {
        "decode": _decode(rows),
        "memory": _memory(rows),
        "ratio": _ratio(rows),
        "prefill": _prefill(rows),
        "train": _train(rows),
    }
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def lines_of(rows: SweepRows, experiment: str, batch: int | None) -> Lines:
    """Rows by line at one batch, from short to long context; with any batch where None."""
    head_dim = rows.model_head_dim()
    lines: Lines = {}
    for place, series, row in rows.cells(experiment):
        if (
            place.routing == UNSTRUCTURED
            and place.head_dim == head_dim
            and batch in (None, place.batch)
        ):
            lines.setdefault(series, []).append(row)
    order = rows.series(experiment)
    return {
        series: sorted(lines[series], key=lambda row: row.x_value or 0.0)
        for series in order
        if any(row.value is not None for row in lines.get(series, []))
    }


def _decode(rows: SweepRows) -> Drawing | None:
    """Milliseconds a step and tokens per second against context."""
    batch = rows.usual_batch("model_decode")
    lines = lines_of(rows, "model_decode", batch)
    if not lines:
        return None
    figure, (left, right) = _frame(
        rows,
        lines,
        "Decoding, whole model",
        f"one token for each of {batch} sequences, {_launch(lines)}; median",
        ["time of a step, ms: lower is better", "tokens per second: higher is better"],
    )
    _draw(left, lines, number, log_y_plain, spread=True)
    _draw(right, lines, lambda row: number(row, "tokens_per_s"), log_y_rate)
    note = _ends(lines, "tokens_per_s", lambda value: f"{significant(value)} tokens/s")
    return Drawing(
        figure,
        f"Decoding speed of whole models at batch {batch} against the tokens that they hold.",
        "A flat line means a cost that does not grow with the context.",
        f"Line charts of decode time and rate against context. At the longest: {note}.",
    )


def _memory(rows: SweepRows) -> Drawing | None:
    """Allocated decoding memory and the peak against context."""
    batch = rows.usual_batch("model_decode")
    lines = lines_of(rows, "model_decode", batch)
    if not lines:
        return None
    peaks = any(number(row, "peak_bytes") for points in lines.values() for row in points)
    titles = ["caches and states", *(["peak, weights included"] if peaks else [])]
    figure, axes = _frame(
        rows,
        lines,
        "Memory of decoding, whole model",
        f"allocated bytes for {batch} sequences; lower is better",
        titles,
    )
    _draw(axes[0], lines, decoding_bytes, log_y_bytes)
    if peaks:
        _draw(axes[1], lines, lambda row: number(row, "peak_bytes"), log_y_bytes)
    note = _ends(lines, "kv_bytes", byte_size)
    return Drawing(
        figure,
        f"Memory that decoding {batch} sequences takes, counted on the real tensors.",
        "A missing end of a line is a cell that did not fit.",
        f"Line charts of bytes against context. KV cache at the longest: {note}.",
    )


def decoding_bytes(row: Row) -> float | None:
    """Caches and states."""
    kept, states = number(row, "kv_bytes"), number(row, "state_bytes")
    return None if kept is None or states is None else kept + states


def _ratio(rows: SweepRows) -> Drawing | None:
    """How many times faster HAM decodes than the transformer."""
    experiments = {"mixer_decode": "one mixer", "model_decode": "whole model"}
    panels: dict[str, dict[Series, list[tuple[float, float]]]] = {}
    for experiment, title in experiments.items():
        batch = rows.usual_batch(experiment)
        found = _ratios(lines_of(rows, experiment, batch))
        if found:
            panels[f"{title}, batch {batch}"] = found
    if not panels:
        return None
    series = list(dict.fromkeys(one for panel in panels.values() for one in panel))
    figure, axes = _frame(
        rows,
        {one: [] for one in series},
        "HAM against the transformer, decoding",
        "times faster, from medians of the same run; above 1 HAM is faster",
        list(panels),
    )
    styles = series_styles(series)
    for panel, lines in zip(axes, panels.values(), strict=True):
        for one, points in lines.items():
            xs, ys = zip(*points, strict=True)
            panel.plot(xs, ys, **line_style(styles[one]))
        _contexts(panel, sorted({x for points in lines.values() for x, _ in points}))
        panel.axhline(1.0, color=MUTED, linewidth=1.0)
        panel.set_yscale("log")
        pad_log(panel, 1.1)
        log_y_plain(panel)
    words = "; ".join(
        f"{title}, {one.name}: {significant(points[-1][1])}× at {points[-1][0]:,.0f}"
        for title, lines in panels.items()
        for one, points in lines.items()
    )
    return Drawing(
        figure,
        "Decode time of the transformer over that of HAM, for each routed share.",
        "Where reading the cache is all that counts, the factor is one over the share.",
        f"Line charts of a factor against context. At the longest: {words}.",
    )


def _ratios(lines: Lines) -> dict[Series, list[tuple[float, float]]]:
    # Of one run only: another run had another clock or another code.
    dense = {(row.x_value, row.manifest_id): number(row) for row in lines.get(DENSE, [])}
    found: dict[Series, list[tuple[float, float]]] = {}
    for series, points in lines.items():
        for row in points:
            ours, theirs = number(row), dense.get((row.x_value, row.manifest_id))
            if series.model == HAM and ours and theirs:
                found.setdefault(series, []).append((row.x_value or 0.0, theirs / ours))
    return found


def _prefill(rows: SweepRows) -> Drawing | None:
    """Time to the first token against context."""
    batch = rows.usual_batch("model_prefill")
    lines = lines_of(rows, "model_prefill", batch)
    if not lines:
        return None
    figure, (axes,) = _frame(
        rows,
        lines,
        "Prefill, whole model",
        f"time to the first token of {batch} sequence(s), {_launch(lines)}; median",
        ["milliseconds: lower is better"],
    )
    _draw(axes, lines, number, log_y_plain, spread=True)
    note = _ends(lines, None, lambda value: f"{significant(value)} ms")
    return Drawing(
        figure,
        "Time to read a context into an empty memory, up to the first token.",
        "Every query attends; routing thins the keys alone.",
        f"Line chart of time against context. At the longest: {note}.",
    )


def _train(rows: SweepRows) -> Drawing | None:
    """Training step against context at a fixed number of tokens, and where HAM gets faster."""
    lines = lines_of(rows, "model_train", None)
    if not lines:
        return None
    crossing, _ = crossing_context(rows)
    words = (
        "HAM at 25 % is not faster at the longest context measured"
        if crossing is None
        else f"HAM at 25 % is faster than the transformer from {crossing:,} tokens on"
    )
    figure, (axes,) = _frame(
        rows,
        lines,
        "Training step",
        f"milliseconds at a fixed number of tokens, {_launch(lines)}; lower is better",
        [words],
    )
    _draw(axes, lines, number, log_y_plain, spread=True)
    if crossing is not None:
        axes.axvline(crossing, color=MUTED, linewidth=1.0, linestyle=":")
    note = _ends(lines, None, lambda value: f"{significant(value)} ms")
    return Drawing(
        figure,
        "Time of a training step against the sequence length; batch times length is constant.",
        f"{words}.",
        f"Line chart of time against context. At the longest: {note}.",
    )


def _frame(
    rows: SweepRows, lines: Mapping[Series, object], title: str, subtitle: str, panels: list[str]
) -> tuple[Figure, list[Axes]]:
    """A figure with a legend of the lines and titled panels."""
    failed = any(
        row.value is None for points in lines.values() if isinstance(points, list) for row in points
    )
    names = [series.name for series in lines] + (["failed"] if failed else [])
    figure, axes = new_figure(
        title,
        subtitle,
        columns=len(panels),
        panel_height=3.0,
        left=0.7,
        gap=0.75,
        legend=legend_lines(names),
        titled=True,
        footer=" · ".join(rows.devices),
    )
    styles = series_styles(list(lines))
    handles = [Line2D([], [], label=one.name, **line_style(styles[one])) for one in lines]
    if failed:
        handles.append(
            Line2D([], [], linestyle="none", marker="x", color=MUTED, mew=2.2, label="failed")
        )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.08 / WIDTH_INCHES, 1 - 0.57 / figure.get_figheight()),
        ncol=math.ceil(len(handles) / legend_lines(names)),
        handlelength=2.2,
        columnspacing=1.4,
        borderpad=0.2,
        labelspacing=0.35,
    )
    for panel, words in zip(axes, panels, strict=True):
        panel.set_title(words)
    return figure, axes


def _draw(
    axes: Axes,
    lines: Lines,
    read: Callable[[Row], float | None],
    scale: Callable[[Axes], None],
    spread: bool = False,
) -> None:
    """Lines with gaps where a cell failed, bars from p20 to p80, and marks of failed cells."""
    styles = series_styles(list(lines))
    across = blended_transform_factory(axes.transData, axes.transAxes)
    for slot, (series, points) in enumerate(lines.items()):
        xs = [row.x_value or 0.0 for row in points]
        # A model without a cache holds 0 bytes, which a logarithmic axis cannot show.
        ys = [read(row) or math.nan for row in points]
        style = styles[series]
        axes.plot(xs, ys, **line_style(style))
        for x, row in zip(xs, points, strict=True):
            if spread and row.low is not None and row.high is not None:
                axes.plot([x, x], [row.low, row.high], color=style.color, alpha=0.45, linewidth=1.4)
        failed = [x for x, row in zip(xs, points, strict=True) if row.value is None]
        axes.plot(
            failed,
            [0.03 + 0.045 * slot] * len(failed),
            transform=across,
            linestyle="none",
            marker="x",
            color=style.color,
            markersize=6,
            markeredgewidth=2.0,
            zorder=5,
        )
    _contexts(axes, sorted({row.x_value or 0.0 for points in lines.values() for row in points}))
    axes.set_yscale("log")
    pad_log(axes)
    scale(axes)


def _contexts(axes: Axes, lengths: list[float]) -> None:
    log_x_ticks(axes, lengths)
    axes.set_xlabel(f"context ({token_unit(lengths)})")


def _launch(lines: Lines) -> str:
    modes = sorted({row.launch_mode for points in lines.values() for row in points if row.value})
    return " and ".join(mode.replace("_", " ") for mode in modes)


def _ends(lines: Lines, label: str | None, write: Callable[[float], str]) -> str:
    """The last number of each line in words."""
    words = []
    for series, points in lines.items():
        good = [(row.x_value, number(row, label)) for row in points if number(row, label)]
        if good:
            x, value = good[-1]
            words.append(f"{series.name} {write(value or 0.0)} at {x:,.0f}")
    return "; ".join(words)
