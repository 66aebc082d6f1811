"""Figures of the dial: loss, recall, needles, bytes and time against the share that is kept.

Two ways lead to a share: one trained model whose thresholds are moved, and models trained for it.
Arms that differ in their target alone are named `NAME` and `NAME-TARGET`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

from ham.report.aggregate import SHARED_TIMES, Cell, Point, Results, kv_fraction_cell
from ham.report.formats import bits, byte_size, share, short_bytes, significant
from ham.report.palette import PAPER
from ham.report.plots_base import (
    Drawing,
    Look,
    draw_points,
    failed_words,
    legend_lines,
    line_style,
    mark_failures,
    model_legend,
    new_figure,
)
from ham.report.plots_cost import cache_cell, main_variant
from ham.report.plots_labels import label_margin, place_labels
from ham.report.plots_language import quality_cell
from ham.report.plots_seeds import footer_text, interval_words, line_cells, mixed_seeds

REFERENCES = ("transformer", "gated-delta-rule")


def dial(results: Results, look: Look) -> Drawing | None:
    """Bits per byte against the realised KV fraction of one trained model."""
    lines = {model: dial_points(results, model) for model in results.models}
    lines = {
        m: points for m, points in lines.items() if any(p.cell.value is not None for p in points)
    }
    if not lines:
        return None
    cells = line_cells(lines)
    figure, (axes,) = new_figure(
        "The dial: loss against cache, one trained model",
        "bits per byte of test documents; thresholds recalibrated, no retraining",
        right=label_margin([*lines, "gated-delta-rule"]),
        footer=footer_text(
            results,
            look,
            interval_words(cells),
            "square-root horizontal scale",
            failed_words(lines),
            cells=cells,
        ),
    )
    mixed = mixed_seeds(cells)
    ends = {}
    mark_failures(axes, lines, look)
    for model, points in lines.items():
        end = draw_points(axes, points, look.styles[model], mixed=mixed)
        if end is not None:
            ends[model] = (*end, look.styles[model].color)
    _fraction_axis(axes)
    axes.set_xlabel("realised KV fraction (% of tokens in the cache)")
    axes.set_ylabel("bits per byte")
    references = _dial_references(axes, results, look, lines)
    place_labels(axes, {**ends, **references})
    return Drawing(
        figure,
        "One trained model a curve: its routing thresholds are calibrated on other text for each "
        "target share, frozen, and evaluated"
        + (
            "; horizontal lines: models without a dial, on the test tokens of the main comparison."
            if references
            else "."
        ),
        f"Read from left (no cache) to right (every token cached). {_dial_note(lines)}",
        f"Line chart of bits per byte against realised KV fraction. {_dial_note(lines)}",
    )


def dial_points(results: Results, model: str, metric: str = "bits_per_byte") -> list[Point]:
    """The dial of a model, by realised fraction (mean over seeds)."""
    points = []
    for point in results.series("dial", metric, model=model):
        realised = [r.kv_fraction for r in point.cell.rows if r.kv_fraction is not None]
        x = sum(realised) / len(realised) if realised else point.x
        points.append(Point(x, point.cell))
    return sorted(points, key=lambda point: point.x)


def _dial_references(
    axes: Axes, results: Results, look: Look, lines: Mapping[str, list[Point]]
) -> dict[str, tuple[float, float, str]]:
    labels = {}
    for model in REFERENCES:
        if model in lines or model not in results.models:
            continue
        cell = quality_cell(results, look, model)
        if cell.value is not None:
            style = look.styles[model]
            axes.axhline(cell.value, color=style.color, linestyle=(0, (5, 2)), linewidth=1.5)
            labels[model] = (1.02, cell.value, style.color)
    return labels


def _dial_note(lines: Mapping[str, list[Point]]) -> str:
    notes = []
    for model, points in lines.items():
        good = [p for p in points if p.cell.value is not None]
        if not good:
            continue
        first, last = good[0], good[-1]
        notes.append(
            f"{model}: {bits(first.cell.value)} at {share(first.x)}, "
            f"{bits(last.cell.value)} at {share(last.x)}"
        )
    return "; ".join(notes) + "."


def _signed_root(values: object) -> object:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: object) -> object:
    return np.sign(values) * np.square(values)


def _fraction_axis(axes: Axes) -> None:
    """Shares of tokens on a square-root scale, which shows small ones."""
    axes.set_xscale("function", functions=(_signed_root, _signed_square))
    axes.set_xlim(-0.0004, 1.02)
    axes.xaxis.set_major_locator(FixedLocator([0, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}"))


@dataclass(frozen=True)
class Aspect:
    """One panel of the dial's page.

    Attributes:
        metric: In the rows of the dial.
        title: Name and unit.
        whole: The same quantity of a model without a dial, from the rows of its own part.
        write: Writes a value.
        tick: Writes a tick; `write` when None.
    """

    metric: str
    title: str
    whole: Callable[[Results, Look, str], Cell]
    write: Callable[[float], str]
    tick: Callable[[float], str] | None = None


def _decode_time(results: Results, look: Look, model: str) -> Cell:
    keep = main_variant(results, model, "throughput", "decode")
    where = {"model": model, "task": "decode", "x": _measured_context(results), "keep": keep}
    return results.cell("throughput", "decode_ms", **where)


def _measured_context(results: Results) -> float | None:
    """The context at which bytes and times of the dial were taken."""
    contexts = results.label_values("dial", "decode_ms", "context")
    return float(contexts[-1]) if contexts else None


ASPECTS = (
    Aspect("bits_per_byte", "bits per byte", quality_cell, bits),
    Aspect(
        "needle_accuracy",
        "needle accuracy",
        lambda results, look, model: results.pooled_cell("needle", "accuracy", model=model),
        share,
    ),
    Aspect(
        "recall_accuracy",
        "recall accuracy",
        lambda results, look, model: results.pooled_cell("recall", "accuracy", model=model),
        share,
    ),
    Aspect(
        "cache_bytes_allocated",
        "decoding memory",
        lambda results, look, model: cache_cell(results, model, _measured_context(results)),
        byte_size,
        short_bytes,
    ),
    Aspect("decode_ms", "decoding (ms per token)", _decode_time, significant),
)


def trained_family(look: Look, model: str) -> list[str]:
    """Arms that are `model` with another target, itself included; by the names that arms have."""
    alike = re.compile(rf"{re.escape(model)}(-\d+(\.\d+)?)?")
    return [name for name in look.styles if alike.fullmatch(name) and name in look.targets]


def dial_page(results: Results, look: Look) -> Drawing | None:
    """Everything that the dial moves, on one page: moved lines, trained points, references."""
    aspects = [aspect for aspect in ASPECTS if _measured(results, aspect)]
    if len(aspects) < 2:
        return None
    models = _dialled_models(results, look)
    others = [m for m in REFERENCES if m in results.models and m not in models]
    named = [*models, *others]
    figure, panels = new_figure(
        "The dial on one page",
        "each panel against the realised KV fraction (% of tokens in the cache)",
        columns=2,
        rows=math.ceil(len(aspects) / 2),
        panel_height=1.75,
        row_gap=0.95,
        left=0.8,
        gap=0.85,
        legend=legend_lines(named),
        footer=footer_text(
            results, look, "line: one model, thresholds moved", "hollow: trained for its share"
        ),
    )
    words = []
    for axes, aspect in zip(panels, aspects, strict=False):
        _aspect_panel(axes, results, look, aspect, models, others)
        words += [_range_words(results, aspect, model) for model in models]
    for axes in panels[len(aspects) :]:
        axes.set_visible(False)
    model_legend(figure, look, named)
    said = "; ".join(filter(None, words))
    return Drawing(
        figure,
        "Lines: one trained model a line, its thresholds calibrated for each target share and "
        "frozen. Hollow markers: models trained for the target they stand at, asked the same. "
        "Dashed: models without a dial, on the text and questions of their own parts."
        + (f" {SHARED_TIMES}" if results.shared_gpu() else ""),
        f"Where hollow markers lie below the line in loss, training for a share pays. {said}.",
        f"Panels of the dial against the realised KV fraction. {said}.",
    )


def _measured(results: Results, aspect: Aspect) -> bool:
    if aspect.metric == "decode_ms" and results.shared_gpu():
        return False
    return any(row.value is not None for row in results.find("dial", aspect.metric))


def _dialled_models(results: Results, look: Look) -> list[str]:
    """Models with rows of the dial; of a family of targets its first member stands for all."""
    found = [m for m in results.models if results.find("dial", "bits_per_byte", model=m)]
    members = {name for model in found for name in trained_family(look, model) if name != model}
    return [model for model in found if model not in members]


def _aspect_panel(
    axes: Axes, results: Results, look: Look, aspect: Aspect, models: list[str], others: list[str]
) -> None:
    mixed = mixed_seeds(
        point.cell for model in models for point in dial_points(results, model, aspect.metric)
    )
    for model in models:
        style = look.styles[model]
        points = dial_points(results, model, aspect.metric)
        # Hollow is taken here, so a line of one seed just has no bars.
        draw_points(axes, points, style, mixed=mixed, hollow=False)
        for name in trained_family(look, model):
            # At its own target on its own dial: the same text and questions as the line.
            cell = results.cell("dial", aspect.metric, model=name, x=look.targets[name])
            kept = kv_fraction_cell(cell.rows)
            if cell.value is None or kept is None or kept.value is None:
                continue
            hollow = {"markerfacecolor": PAPER, "markeredgecolor": style.color}
            shape = line_style(style, size=7.5, linestyle="none", **hollow, markeredgewidth=1.5)
            axes.plot([kept.value], [cell.value], **shape)
    for model in others:
        cell = aspect.whole(results, look, model)
        if cell.value is not None:
            axes.axhline(
                cell.value, color=look.styles[model].color, linestyle=(0, (5, 2)), linewidth=1.3
            )
    _fraction_axis(axes)
    axes.xaxis.set_major_locator(FixedLocator([0, 1 / 16, 1 / 4, 1 / 2, 1]))
    axes.set_xlabel("realised KV fraction (%)")
    axes.set_ylabel(aspect.title)
    axes.margins(y=0.12)
    write = aspect.tick or (aspect.write if aspect.write is share else None)
    if aspect.tick is not None:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(
            MultipleLocator(2.0 ** math.floor(math.log2((high - low) / 3)))
        )
    if write is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _range_words(results: Results, aspect: Aspect, model: str) -> str:
    good = [p for p in dial_points(results, model, aspect.metric) if p.cell.value is not None]
    if not good:
        return ""
    first, last = good[0], good[-1]
    return (
        f"{model}, {aspect.title}: {aspect.write(first.cell.value)} at {share(first.x)}, "
        f"{aspect.write(last.cell.value)} at {share(last.x)}"
    )
