"""Figures of language modelling: bits per byte, by position, by class of word; lm-eval tasks."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from ham.report.aggregate import Cell, Results, summarise, summarise_pooled
from ham.report.formats import bits, cell_text, join_words
from ham.report.palette import INK, MUTED
from ham.report.plots_base import (
    Drawing,
    Look,
    hollow_style,
    legend_lines,
    line_style,
    model_legend,
    new_figure,
)
from ham.report.plots_labels import label_margin
from ham.report.plots_seeds import footer_text, interval_words, mixed_seeds
from ham.report.tables_base import chance_level


def main_context(results: Results, look: Look) -> float | None:
    """The context at which models are compared: the training context, else the longest."""
    contexts = results.x_values("language_modelling", "bits_per_byte")
    if look.context in contexts:
        return float(look.context or 0)
    return contexts[-1] if contexts else None


def quality_cell(results: Results, look: Look, model: str) -> Cell:
    """Bits per byte of a model at the main context."""
    context = main_context(results, look)
    return results.cell("language_modelling", "bits_per_byte", model=model, x=context)


def unigram_cell(results: Results) -> Cell:
    """Bits per byte of the unigram model; the same for every arm, so rows are pooled."""
    cell = summarise_pooled(results.find("language_modelling", "unigram_bits_per_byte"))
    return cell if cell.value is None else summarise(list(cell.rows)[-1:])


def bits_per_byte(results: Results, look: Look) -> Drawing | None:
    """One dot a model with its interval, sorted; the unigram model as reference."""
    cells = {model: quality_cell(results, look, model) for model in results.models}
    good = {m: cell for m, cell in cells.items() if cell.value is not None}
    if not good:
        return None
    order = sorted(good, key=lambda model: good[model].value or 0.0)
    failed = [model for model in results.models if cells[model].status == "failed"]
    context = main_context(results, look)
    rows = order + failed
    figure, (axes,) = new_figure(
        "Bits per byte on held-out text",
        f"test documents, context {context:,.0f} tokens; lower is better",
        left=label_margin(rows),
        right=0.95,
        panel_height=0.34 * len(rows) + 0.35,
        footer=footer_text(results, look, interval_words(good.values()), cells=good.values()),
    )
    mixed = mixed_seeds(good.values())
    for index, model in enumerate(rows):
        _dot(axes, index, cells[model], look, model, mixed)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(rows)))))
    axes.set_yticklabels(rows, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bits per byte")
    axes.margins(x=0.06)
    unigram = unigram_cell(results).value
    _draw_unigram(axes, unigram)
    best, worst = order[0], order[-1]
    note = f"Lower is better. {best} is lowest ({cell_text(good[best], bits)})"
    if worst != best:
        note += f"; from best to worst it is {bits(good[worst].value - good[best].value)}"
    if unigram is not None:
        note += f". A unigram model needs {bits(unigram)}"
    words = "; ".join(f"{model} {cell_text(cells[model], bits)}" for model in rows)
    return Drawing(
        figure,
        "Each dot is a model's mean over held-out test documents; small dots are single seeds.",
        note + ".",
        f"Dot plot of bits per byte, lower is better: {words}.",
    )


def _dot(axes: Axes, index: int, cell: Cell, look: Look, model: str, mixed: bool) -> None:
    style = look.styles[model]
    if cell.estimate is None:
        axes.text(
            0.02, index, "failed", transform=axes.get_yaxis_transform(), va="center", color=MUTED
        )
        return
    estimate = cell.estimate
    alone = mixed and estimate.n == 1
    if estimate.low is not None and not alone:
        axes.plot(
            [estimate.low, estimate.high], [index, index], color=style.color, alpha=0.5, linewidth=3
        )
    if len(cell.by_seed) > 1:
        values = [value for _, value in cell.by_seed]
        axes.plot(values, [index] * len(values), ".", color=style.color, alpha=0.6, markersize=4)
    shape = hollow_style(style, 8.5) if alone else line_style(style, 8.5, linestyle="none")
    axes.plot([estimate.value], [index], **shape)
    axes.text(
        1.02,
        index,
        bits(estimate.value),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontweight="bold",
        color=style.color,
    )


def _draw_unigram(axes: Axes, unigram: float | None) -> None:
    """A line where it fits on the axis; otherwise a note at the edge, to keep models apart."""
    if unigram is None:
        return
    low, high = axes.get_xlim()
    if unigram <= high + 0.6 * (high - low):
        axes.axvline(unigram, color=MUTED, linestyle=":", linewidth=1.5)
        axes.set_xlim(low, max(high, unigram + 0.05 * (high - low)))
        words, x = f"unigram model: {bits(unigram)}", unigram
    else:
        words, x = f"unigram model: {bits(unigram)}, off the scale →", high
    axes.annotate(
        words,
        (x, 1.02),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="bottom",
        color=MUTED,
        fontsize=8.5,
    )


def lm_eval_tasks(results: Results, look: Look) -> Drawing | None:
    """Accuracy of each lm-eval task beside chance."""
    tasks = [
        task
        for task in results.tasks("lm_eval", "accuracy")
        if any(r.value is not None for r in results.find("lm_eval", "accuracy", task=task))
    ]
    if not tasks:
        return None
    models = [m for m in results.models if results.find("lm_eval", "accuracy", model=m)]
    cells = {
        (task, model): results.cell("lm_eval", "accuracy", model=model, task=task)
        for task in tasks
        for model in models
    }
    figure, (axes,) = new_figure(
        "lm-eval accuracy by task",
        "share correct; the grey bar is chance",
        left=2.0,
        legend=legend_lines(models),
        panel_height=len(tasks) * (0.13 * len(models) + 0.28) + 0.1,
        footer=footer_text(results, look, interval_words(cells.values()), cells=cells.values()),
    )
    mixed = mixed_seeds(cells.values())
    for index, task in enumerate(tasks):
        chance = chance_level(results, task)
        if chance is not None:
            axes.plot(
                [chance, chance],
                [index - 0.42, index + 0.42],
                color=MUTED,
                linewidth=3,
                alpha=0.6,
                solid_capstyle="butt",
            )
        for slot, model in enumerate(models):
            y = index + 0.7 * ((slot + 0.5) / len(models) - 0.5)
            _task_dot(axes, cells[task, model], y, look, model, mixed)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(tasks)))))
    axes.set_yticklabels([task.replace("_", " ") for task in tasks], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(-0.01, None)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.set_xlabel("accuracy")
    model_legend(figure, look, models)
    above = _above_chance(results, tasks, models)
    return Drawing(
        figure,
        "Zero-shot accuracy on lm-evaluation-harness tasks, with 95 % intervals.",
        f"Only an interval wholly right of the grey bar is better than chance: {above}.",
        f"Dot plot of accuracies for the tasks {join_words(tasks)}; above chance: {above}.",
    )


def _task_dot(axes: Axes, cell: Cell, y: float, look: Look, model: str, mixed: bool) -> None:
    style = look.styles[model]
    if cell.status == "failed":
        axes.plot(
            [0.0], [y], linestyle="none", marker="x", color=style.color, mew=2.0, clip_on=False
        )
    if cell.estimate is None:
        return
    alone = mixed and cell.estimate.n == 1
    if cell.estimate.low is not None and not alone:
        axes.plot([cell.estimate.low, cell.estimate.high], [y, y], color=style.color, alpha=0.5)
    shape = hollow_style(style) if alone else line_style(style, linestyle="none")
    axes.plot([cell.estimate.value], [y], **shape)


def _above_chance(results: Results, tasks: list[str], models: list[str]) -> str:
    above, compared = 0, 0
    for task in tasks:
        chance = chance_level(results, task)
        for model in models:
            estimate = results.cell("lm_eval", "accuracy", model=model, task=task).estimate
            if estimate is not None and estimate.low is not None and chance is not None:
                compared += 1
                above += estimate.low > chance
    return f"{above} of {compared} model-task pairs"


CLASS_WORDS = {
    "recall": "recalled: after the same\nword as earlier in the window",
    "other": "not recalled",
    "recall_rare": "recalled and rare",
    "rare": "rare in the training text",
    "frequent": "frequent in the training text",
}
"""What the classes of `ham.evaluate.word_classes` are called."""


def token_classes(results: Results, look: Look) -> Drawing | None:
    """Bits per byte of each class of words, at the main context."""
    context = main_context(results, look)
    metric = "class_bits_per_byte"
    cells = {
        (name, model): results.cell(
            "language_modelling", metric, model=model, x=context, token_class=name
        )
        for name in CLASS_WORDS
        for model in results.models
    }
    cells = {key: cell for key, cell in cells.items() if cell.value is not None}
    if not cells:
        return None
    names = [name for name in CLASS_WORDS if any(key[0] == name for key in cells)]
    models = [model for model in results.models if any(key[1] == model for key in cells)]
    figure, (axes,) = new_figure(
        "Bits per byte by class of word",
        f"test documents, context {context:,.0f} tokens; lower is better",
        left=2.3,
        legend=legend_lines(models),
        panel_height=len(names) * (0.13 * len(models) + 0.28) + 0.1,
        footer=footer_text(results, look, interval_words(cells.values()), cells=cells.values()),
    )
    mixed = mixed_seeds(cells.values())
    for index, name in enumerate(names):
        for slot, model in enumerate(models):
            if (name, model) in cells:
                y = index + 0.7 * ((slot + 0.5) / len(models) - 0.5)
                _task_dot(axes, cells[name, model], y, look, model, mixed)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(names)))))
    axes.set_yticklabels([CLASS_WORDS[name] for name in names], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bits per byte")
    model_legend(figure, look, models)
    words = _class_gaps(cells, models)
    return Drawing(
        figure,
        "Words are what stands between white space; every byte counts for its word.",
        f"A model with a memory needs fewer bits for words it can recall. {words}",
        f"Dot plot of bits per byte by class of word. {words}",
    )


def _class_gaps(cells: Mapping[tuple[str, str], Cell], models: list[str]) -> str:
    gaps = {
        model: cells["other", model].value - cells["recall", model].value
        for model in models
        if ("other", model) in cells and ("recall", model) in cells
    }
    if not gaps:
        return "No window repeats a pair of words."
    parts = [f"{model} {bits(gap)}" for model, gap in gaps.items()]
    return f"Bits per byte saved on recalled words: {join_words(parts)}."
