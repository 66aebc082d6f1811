"""Figures of training: loss, validation loss, routed fraction per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ham.report.aggregate import Point, Results
from ham.report.formats import bits, join_words, share
from ham.report.palette import MUTED, Style, shades
from ham.report.plots_base import (
    Drawing,
    Look,
    end_series,
    failed_words,
    mark_failures,
    model_title,
    new_figure,
)
from ham.report.plots_labels import label_line_ends, label_margin, place_labels
from ham.report.plots_seeds import footer_text

SMOOTH_ABOVE = 60
MAX_THIN_POINTS = 500


def training_loss(results: Results, look: Look) -> Drawing | None:
    """Training loss against optimiser steps; seeds thin, their mean bold."""
    return _loss_figure(
        results,
        look,
        task="train",
        title="Training loss",
        shown="Loss on the training batches against optimiser steps; every model reads the same "
        "batches in the same order.",
    )


def validation_loss(results: Results, look: Look) -> Drawing | None:
    """Validation loss against optimiser steps."""
    return _loss_figure(
        results,
        look,
        task="validation",
        title="Validation loss",
        shown="Loss on held-out validation documents during training.",
    )


def recall_loss(results: Results, look: Look) -> Drawing | None:
    """Loss on held-out recall documents against optimiser steps; a fall is a look-up learned."""
    return _loss_figure(
        results,
        look,
        task="recall",
        title="Loss on recall documents",
        shown="Loss on the answers of held-out recall documents during training: copies, pairs and "
        "needles. Where a seed falls, its model has begun to look answers up.",
    )


def _loss_figure(
    results: Results, look: Look, *, task: str, title: str, shown: str
) -> Drawing | None:
    lines = {
        model: results.series("train", "loss_nats", model=model, task=task)
        for model in results.models
    }
    lines = {model: points for model, points in lines.items() if points}
    if not any(p.cell.value is not None for points in lines.values() for p in points):
        return None
    window = _window(lines.values())
    foot = ["thin: each seed, bold: their mean"] if len(results.seeds()) > 1 else []
    # Single batches differ more than models do, and the enlarged part shows it.
    wide = 4 * window + 1 if window > 1 else 1
    if window > 1:
        foot.append(f"running mean over {window} points, right {wide} and no single seeds")
    foot.append(failed_words(lines))
    figure, (whole, last) = new_figure(
        title,
        "nats per token; left the whole run, right its last third enlarged",
        columns=2,
        panel_height=2.9,
        gap=0.6,
        right=label_margin(lines),
        footer=footer_text(results, look, *foot),
    )
    zoom_from = max(point.x for points in lines.values() for point in points) * 2 / 3
    ends: dict[str, tuple[float, float]] = {}
    drawn: dict[str, tuple[float, float]] = {}
    mark_failures(whole, lines, look)
    for model, points in lines.items():
        good = [point for point in points if point.cell.value is not None]
        if good:
            ends[model] = (good[-1].x, good[-1].cell.value or 0.0)
            _draw_loss(whole, good, window, look.styles[model], -math.inf)
            end = _draw_loss(last, good, wide, look.styles[model], zoom_from, seeds=window == 1)
            if end is not None:
                drawn[model] = end
    for axes in (whole, last):
        axes.set_xlabel("optimiser step")
        axes.margins(x=0.02)
    whole.set_ylabel("loss (nats per token)")
    label_line_ends(last, drawn, look)
    order = sorted(ends, key=lambda model: ends[model][1])
    words = "; ".join(f"{model} {bits(ends[model][1])}" for model in order)
    return Drawing(
        figure,
        shown,
        _end_note(order, ends),
        f"Line chart of {title.lower()} against optimiser step. Last values in nats per token: "
        f"{words}.",
    )


def _draw_loss(
    axes: Axes,
    points: Sequence[Point],
    window: int,
    style: Style,
    start: float,
    seeds: bool = True,
) -> tuple[float, float] | None:
    """The seeds thin, if wanted, and their mean bold, from step `start` on; where it ends."""
    known = {seed for point in points for seed, _ in point.cell.by_seed}
    for seed in known if seeds and len(known) > 1 else ():
        steps = [p.x for p in points if seed in dict(p.cell.by_seed)]
        values = [dict(p.cell.by_seed).get(seed, 0.0) for p in points if p.x in set(steps)]
        thin = _from_step(steps, running_mean(values, window), start)
        thin = thin[:: math.ceil(len(thin) / MAX_THIN_POINTS) or 1]
        if thin:
            axes.plot(*zip(*thin, strict=True), color=style.color, linewidth=0.8, alpha=0.35)
    means = running_mean([point.cell.value or 0.0 for point in points], window)
    bold = _from_step([point.x for point in points], means, start)
    if bold:
        end_series(axes, *zip(*bold, strict=True), style)
    return bold[-1] if bold else None


def _from_step(
    steps: Sequence[float], values: Sequence[float], start: float
) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(steps, values, strict=True) if x >= start]


def _end_note(order: list[str], ends: dict[str, tuple[float, float]]) -> str:
    first, last = order[0], order[-1]
    if first == last:
        return f"Lower is better; {first} ends at {bits(ends[first][1])}."
    return (
        f"Lower is better. At the end {first} is lowest ({bits(ends[first][1])}) and {last} "
        f"highest ({bits(ends[last][1])})."
    )


def routed_fraction(results: Results, look: Look) -> Drawing | None:
    """Routed fraction per layer over training, one panel a routing model."""
    models = [
        model
        for model in results.models
        if any(
            r.value is not None
            for r in results.find("train", "kv_fraction", model=model, task="train")
        )
    ]
    if not models:
        return None
    columns = min(3, len(models))
    figure, panels = new_figure(
        "Tokens routed to the KV cache during training",
        "share of the tokens of a training batch, per layer",
        columns=columns,
        rows=math.ceil(len(models) / columns),
        panel_height=2.5,
        right=0.85,
        gap=1.3,
        titled=True,
        footer=footer_text(
            results, look, "dashed: target fraction" if look.targets else "mean over seeds"
        ),
    )
    finals: dict[str, str] = {}
    for axes, model in zip(panels, models, strict=False):
        finals[model] = _routed_panel(axes, results, look, model)
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("share routed")
    return Drawing(
        figure,
        "Realised share of tokens that each layer wrote to its KV cache, over training.",
        "The closed loop moves each layer's threshold until the share meets its target"
        f"{' (dashed)' if look.targets else ''}; it ends at "
        + join_words([f"{finals[m]} ({m})" for m in models])
        + ".",
        "Line charts of the routed fraction per layer against optimiser step. Last values: "
        + "; ".join(f"{model}: {finals[model]}" for model in models)
        + ".",
    )


def _routed_panel(axes: Axes, results: Results, look: Look, model: str) -> str:
    layers = results.label_values("train", "kv_fraction", "layer", model=model, task="train")
    colors = shades(look.styles[model].color, len(layers))
    top, ends, finals = 0.0, {}, []
    for layer, color in zip(layers, colors, strict=True):
        points = results.series("train", "kv_fraction", model=model, layer=layer, task="train")
        good = [(p.x, p.cell.value) for p in points if p.cell.value is not None]
        if not good:
            continue
        axes.plot(
            *zip(*good, strict=True),
            color=color,
            marker=look.styles[model].marker,
            markevery=max(1, len(good) // 6),
            markersize=4.5,
        )
        top = max(top, *(y for _, y in good))
        finals.append(good[-1][1])
        if layer in _labelled(layers):
            ends[f"layer {layer}"] = (*good[-1], color)
    target = look.targets.get(model)
    if target is not None:
        axes.axhline(target, color=MUTED, linestyle="--", linewidth=1.1)
        top = max(top, target)
    axes.set_ylim(0, min(1.02, top * 1.12 + 0.02))
    model_title(axes, model, look)
    axes.set_xlabel("optimiser step")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.margins(x=0.01)
    place_labels(axes, ends)
    low, high = min(finals), max(finals)
    return share(low) if len(finals) == 1 else f"{share(low)} to {share(high)}"


def _labelled(layers: Sequence[int]) -> set[int]:
    """At most six layers get a label, spread over the depth."""
    if len(layers) <= 6:
        return set(layers)
    return {layers[round(i * (len(layers) - 1) / 5)] for i in range(6)}


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean.

    At the start the window shrinks on both sides, because losses fall steeply there; at the end
    it loses its right half only, because a shrinking one would show single noisy batches.
    """
    if window <= 1:
        return list(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    half, n = window // 2, len(values)
    means = []
    for index in range(n):
        first = index - min(half, index)
        last = min(index + min(half, index), n - 1)
        means.append(float((sums[last + 1] - sums[first]) / (last - first + 1)))
    return means


def _window(lines: object) -> int:
    longest = max(len(points) for points in lines)
    return 1 if longest <= SMOOTH_ABOVE else 2 * (longest // 80) + 3
