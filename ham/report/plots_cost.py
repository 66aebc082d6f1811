"""Figures of cost: throughput, memory and cache growth."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ham.report.aggregate import Cell, Point, Results, most_common, or_failure, with_spread_of_time
from ham.report.formats import (
    byte_size,
    join_words,
    short_bytes,
    significant,
    token_unit,
)
from ham.report.plots_axes import log_x_ticks, log_y_bytes, log_y_rate, pad_log
from ham.report.plots_bars import bar_figure
from ham.report.plots_base import (
    Drawing,
    Look,
    draw_points,
    end_series,
    failed_words,
    legend_lines,
    mark_failures,
    model_legend,
    new_figure,
)
from ham.report.plots_labels import label_line_ends, label_margin
from ham.report.plots_seeds import footer_text, line_cells
from ham.report.rows import Row

Panels = dict[str, dict[str, list[Point]]]

SPEED_TASKS = {"prefill": "prefill_ms", "decode": "decode_ms", "train": "training_step_ms"}
SPEED_TITLES = {"prefill": "prefill", "decode": "decode", "train": "training step"}
MEMORY_PANELS = (
    ("cache_bytes_allocated", None, "decoding cache"),
    ("peak_memory_bytes", "prefill", "peak, prefill"),
    ("peak_memory_bytes", "train", "peak, training step"),
)


def main_batch(results: Results) -> object:
    """The batch size that most speed rows have."""
    return most_common(
        row.labels["batch_size"]
        for row in results.rows
        if row.experiment == "throughput" and "batch_size" in row.labels
    )


def main_variant(
    results: Results, model: str, experiment: str, task: str | None = None
) -> Callable[[Row], bool]:
    """A filter for the provider, launch mode and device that most rows of a model have.

    Of one task, if it is given: a step may be launched in another way than a prefill.
    """
    variant = most_common(
        (row.device, row.provider, row.launch_mode)
        for row in results.rows
        if row.experiment == experiment and row.model == model and task in (None, row.task)
    )
    batch = main_batch(results)

    def keep(row: Row) -> bool:
        same = (row.device, row.provider, row.launch_mode) == variant
        return same and row.labels.get("batch_size", batch) == batch

    return keep


def speed_points(results: Results, model: str, task: str) -> list[Point]:
    """Tokens per second of a task; a failed time counts where the rate has no row."""
    keep = main_variant(results, model, "throughput", task)
    contexts = sorted(
        {
            x
            for metric in ("tokens_per_second", SPEED_TASKS[task])
            for x in results.x_values("throughput", metric, model=model, task=task, keep=keep)
        }
    )
    points = []
    for x in contexts:
        where = {"model": model, "task": task, "x": x, "keep": keep}
        rate = results.cell("throughput", "tokens_per_second", **where)
        time = results.cell("throughput", SPEED_TASKS[task], **where)
        points.append(Point(x, with_spread_of_time(or_failure(rate, time), time)))
    return points


def throughput(results: Results, look: Look) -> Drawing | None:
    """Tokens per second against context: prefill, decode, training step."""
    panels = {
        task: {m: p for m in results.models if (p := speed_points(results, m, task))}
        for task in SPEED_TASKS
    }
    panels = {
        task: lines
        for task, lines in panels.items()
        if any(p.cell.value is not None for points in lines.values() for p in points)
    }
    if not panels:
        return None
    panels = {SPEED_TITLES[task]: lines for task, lines in panels.items()}
    batch = main_batch(results)
    words = "tokens per second, higher is better" + (f"; batch size {batch}" if batch else "")
    best = {title: _best_at_longest(lines, max) for title, lines in panels.items()}
    note = "; ".join(
        f"{title}: {model} ({significant(value)} tokens/s at {x:,.0f})"
        for title, (model, x, value) in best.items()
    )
    origin = f"median of the repetitions, on {join_words(_devices(results, 'throughput'))} "
    origin += f"({_modes(results)})"
    spread = _spread_words(panels)
    context = _only_context(panels)
    if context is not None:
        figure = _bars(results, look, "Throughput", words, panels, spread, "tokens/s", significant)
        return Drawing(
            figure,
            f"Speed of each model at a context of {context:,.0f} tokens, {origin}.",
            f"Fastest in {note}.",
            f"Bar charts of tokens per second. Fastest in {note}.",
        )
    figure, axes_list = _panels(results, look, "Throughput", words, panels, spread)
    for axes, (title, lines) in zip(axes_list, panels.items(), strict=True):
        _fill_panel(axes, lines, look, log_y_rate)
        axes.set_title(title)
    axes_list[0].set_ylabel("tokens per second")
    return Drawing(
        figure,
        f"Speed of each model against the context length, {origin}.",
        "A flat line means a cost per token that does not grow. Fastest at the longest context: "
        f"{note}.",
        f"Line charts of tokens per second against context. Fastest at the longest: {note}.",
    )


def memory(results: Results, look: Look) -> Drawing | None:
    """Bytes against context: the decoding cache and peaks."""
    panels = {}
    for metric, task, title in MEMORY_PANELS:
        lines = {m: _memory_points(results, m, metric, task) for m in results.models}
        lines = {m: points for m, points in lines.items() if points}
        if any(p.cell.value is not None for points in lines.values() for p in points):
            panels[title] = lines
    if not panels:
        return None
    words = "allocated bytes, lower is better"
    title, lines = next(iter(panels.items()))
    model, x, value = _best_at_longest(lines, min)
    note = f"Smallest {title} at {x:,.0f} tokens: {model} ({byte_size(value)})"
    counted = (
        "counted on the real tensors: keys and values, positions, page tables, recurrent and "
        "convolution states; peaks as the allocator or the system reports them."
    )
    context = _only_context(panels)
    if context is not None:
        figure = _bars(results, look, "Memory", words, panels, "", "bytes", byte_size)
        shown = f"Bytes at a context of {context:,.0f} tokens, {counted}"
        return Drawing(figure, shown, f"{note}.", f"Bar charts of bytes. {note}.")
    figure, axes_list = _panels(results, look, "Memory", words, panels, "")
    for axes, (title, lines) in zip(axes_list, panels.items(), strict=True):
        _fill_panel(axes, lines, look, log_y_bytes)
        axes.set_title(title)
    axes_list[0].set_ylabel("bytes")
    return Drawing(
        figure,
        f"Bytes {counted}",
        f"A flat line is a state of fixed size; a rising one keeps tokens. {note}.",
        f"Line charts of bytes against context. {note}.",
    )


def _memory_points(results: Results, model: str, metric: str, task: str | None) -> list[Point]:
    keep = main_variant(results, model, "memory")
    if task is None:
        tasks = {row.task for row in results.find("memory", metric, model=model)}
        task = next((t for t in ("decode", "prefill", "train") if t in tasks), None)
        if task is None and tasks != {None}:
            return []
    return results.series("memory", metric, model=model, task=task, keep=keep)


def cache_cell(results: Results, model: str, context: float | None) -> Cell:
    """Allocated bytes of the decoding cache at one context."""
    points = _memory_points(results, model, "cache_bytes_allocated", None)
    return next((p.cell for p in points if p.x == context), Cell(None))


def kv_growth(results: Results, look: Look) -> Drawing | None:
    """Bytes of keys and values while one document is read."""
    lines = {
        model: results.series("memory", "kv_bytes", model=model, task="kv_growth")
        for model in results.models
    }
    lines = {model: points for model, points in lines.items() if points}
    if not any(p.cell.value is not None for points in lines.values() for p in points):
        return None
    figure, (axes,) = new_figure(
        "Growth of the KV cache over one document",
        "bytes of keys and values held after reading so many tokens",
        left=0.95,
        right=label_margin(lines),
        footer=footer_text(
            results,
            look,
            "models without a KV cache stay at 0",
            failed_words(lines),
            cells=line_cells(lines),
        ),
    )
    ends = {}
    for model, points in lines.items():
        good = [p for p in points if p.cell.value is not None]
        if good:
            end_series(
                axes, [p.x for p in good], [p.cell.value or 0.0 for p in good], look.styles[model]
            )
            ends[model] = (good[-1].x, good[-1].cell.value or 0.0)
    _linear_bytes(axes)
    mark_failures(axes, lines, look)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("bytes of keys and values")
    axes.margins(x=0.01)
    label_line_ends(axes, ends, look)
    words = "; ".join(f"{model} {byte_size(y)}" for model, (_, y) in ends.items())
    return Drawing(
        figure,
        "Bytes of keys and values while one test document is read token by token.",
        "Where a model routes, a steep piece is text that its recurrent memory did not predict. "
        f"At the end: {words}.",
        f"Line chart of KV bytes against tokens read. At the end: {words}.",
    )


def _linear_bytes(axes: Axes) -> None:
    """Ticks at round binary sizes."""
    _, high = axes.get_ylim()
    step = 1.0
    while high / step > 6:
        step *= 2
    axes.set_yticks([step * i for i in range(int(high / step) + 1)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.set_ylim(-0.02 * high, high)


def _only_context(panels: Panels) -> float | None:
    """The context of every point, or None where there are several."""
    contexts = {p.x for lines in panels.values() for points in lines.values() for p in points}
    return contexts.pop() if len(contexts) == 1 else None


def _panel_cells(panels: Panels) -> list[Cell]:
    return [cell for lines in panels.values() for cell in line_cells(lines)]


def _spread_words(panels: Panels) -> str:
    """What thin bars mean; empty where nothing has an interval."""
    estimates = [cell.estimate for cell in _panel_cells(panels) if cell.estimate is not None]
    return "thin line: p20 to p80" if any(one.low is not None for one in estimates) else ""


def _bars(
    results: Results,
    look: Look,
    title: str,
    subtitle: str,
    panels: Panels,
    foot: str,
    unit: str,
    write: Callable[[float], str],
) -> Figure:
    """Points of one context as bars, which do not hide one another."""
    cells = {
        name: {model: points[0].cell for model, points in lines.items()}
        for name, lines in panels.items()
    }
    footer = footer_text(results, look, foot, cells=_panel_cells(panels))
    return bar_figure(title, subtitle, cells, look, results.models, footer, unit, write)


def _panels(
    results: Results, look: Look, title: str, subtitle: str, panels: Panels, foot: str
) -> tuple:
    models = [m for m in results.models if any(m in lines for lines in panels.values())]
    failed = any(
        p.cell.status == "failed"
        for lines in panels.values()
        for points in lines.values()
        for p in points
    )
    labels = [*models, "failed"] if failed else models
    figure, axes_list = new_figure(
        title,
        subtitle,
        columns=len(panels),
        panel_height=2.7,
        left=0.85,
        gap=0.72,
        legend=legend_lines(labels),
        titled=True,
        footer=footer_text(results, look, foot, cells=_panel_cells(panels)),
    )
    model_legend(figure, look, models, failed)
    return figure, axes_list


def _fill_panel(axes: Axes, lines: dict, look: Look, scale: Callable[[Axes], None]) -> None:
    for model, points in lines.items():
        draw_points(axes, points, look.styles[model])
    lengths = sorted({p.x for points in lines.values() for p in points})
    log_x_ticks(axes, lengths)
    if any((p.cell.value or 0.0) > 0 for points in lines.values() for p in points):
        axes.set_yscale("log")
        pad_log(axes)
        scale(axes)
    mark_failures(axes, lines, look)
    axes.set_xlabel(f"context ({token_unit(lengths)})")


def _best_at_longest(lines: dict, choose: Callable) -> tuple[str, float, float]:
    good = {
        (model, p.x): p.cell.value
        for model, points in lines.items()
        for p in points
        if p.cell.value is not None
    }
    longest = max(x for _, x in good)
    at_longest = {model: value for (model, x), value in good.items() if x == longest}
    model = choose(at_longest, key=lambda name: at_longest[name])
    return model, longest, at_longest[model]


def _devices(results: Results, experiment: str) -> list[str]:
    return sorted({row.device for row in results.rows if row.experiment == experiment})


def _modes(results: Results) -> str:
    modes = {
        (row.provider, row.launch_mode.replace("_", " "))
        for row in results.rows
        if row.experiment == "throughput"
    }
    return join_words([f"{provider}, {mode}" for provider, mode in sorted(modes)])
