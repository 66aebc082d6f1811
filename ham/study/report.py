"""What the study found: table, figure and paired comparison from its rows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from ham.errors import MissingDataError
from ham.files import atomic_writer, write_text
from ham.report.aggregate import Cell, Results, difference, kv_fraction_cell, summarise_pooled
from ham.report.formats import cell_text, join_words, share
from ham.report.plots_axes import log_x_ticks
from ham.report.plots_base import (
    Look,
    draw_points,
    failed_words,
    footer_text,
    label_line_ends,
    label_margin,
    mark_failures,
    new_figure,
    save_png,
    save_svg,
    style_context,
)
from ham.report.rows import Row
from ham.report.table_format import to_csv, to_markdown
from ham.report.tables_base import Column, Record, Table, optional
from ham.study.runs import EXPERIMENT, TUNING

# Decided before the runs: each score against the others, and all against random routing.
COMPARED = ("ham-committed", "ham-cosine", "ham-l2", "ham-post-update", "ham-learned", "ham-random")
SETTING = ("filler", "layout", "width")
NOTE = (
    "Accuracy: share of queried keys whose value is the first choice over the whole vocabulary, at "
    "tokens/pairs. KV fraction: realised share of tokens in the cache at the largest size, mean "
    "over layers. Pairs kept: share of value positions routed there, per layer. Thresholds are "
    "frozen; learning rates were chosen on a seed that is not shown, where there was a choice."
)
RULE = (
    "The score with the higher mean over both fillers and all sizes is the better default if the "
    "interval of the paired difference leaves out 0."
)


def build_report(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write `mqar.md`, two CSV files and the figure; returns their paths.

    Raises:
        MissingDataError: If there is no row of the study.
    """
    results = Results([row for row in rows if row.experiment == EXPERIMENT])
    if not results.rows:
        raise MissingDataError(f"no rows of experiment {EXPERIMENT!r} among {len(rows)} rows")
    accuracy, paired = accuracy_table(results), comparison_table(results)
    texts = [to_markdown(accuracy, smoke=False), to_markdown(paired, smoke=False)]
    texts.append("\n".join([*verdicts(results), "", *chosen_rates(rows)]))
    write_text(out / "mqar.md", "\n".join(texts) + "\n")
    write_text(out / "mqar.csv", to_csv(accuracy))
    write_text(out / "mqar-paired.csv", to_csv(paired))
    with style_context():
        figure = recall_figure(results)
        with atomic_writer(out / "mqar.png", "wb") as handle:
            handle.write(save_png(figure))
        write_text(out / "mqar.svg", save_svg(figure))
    names = ("mqar.md", "mqar.csv", "mqar-paired.csv", "mqar.png", "mqar.svg")
    return [out / name for name in names]


def settings_of(results: Results) -> list[dict[str, str | int]]:
    """Every filler, layout and width that occur together."""
    found = {
        tuple((name, row.labels[name]) for name in SETTING)
        for row in results.find(EXPERIMENT, "accuracy")
    }
    return [dict(setting) for setting in sorted(found)]


def words_for(setting: dict[str, str | int]) -> str:
    """A setting in a few words."""
    place = "" if setting["layout"] == "prefix" else f", {setting['layout']} pairs"
    return f"{setting['filler']} filler{place}, d {setting['width']}"


def sizes_of(results: Results) -> list[str]:
    """Every size as `length/pairs`, small first."""
    return sorted(
        results.tasks(EXPERIMENT, "accuracy"), key=lambda task: [int(p) for p in task.split("/")]
    )


def accuracy_table(results: Results) -> Table:
    """One record for each setting and arm."""
    sizes = sizes_of(results)
    layers = results.label_values(EXPERIMENT, "pairs_kept_fraction", "layer")
    columns = [Column("setting", "setting"), Column("model", "model")]
    columns += [Column(f"accuracy_{size}", size, share) for size in sizes]
    columns.append(Column("kv_fraction", "KV fraction", share))
    columns += [
        Column(f"pairs_kept_{layer}", f"pairs kept, layer {layer + 1}", share) for layer in layers
    ]
    records = []
    for setting in settings_of(results):
        for model in results.models:
            where = {"model": model, **setting}
            if not results.find(EXPERIMENT, "accuracy", **where):
                continue
            record: Record = {"setting": words_for(setting), "model": model}
            for size in sizes:
                record[f"accuracy_{size}"] = results.cell(
                    EXPERIMENT, "accuracy", task=size, **where
                )
            where["task"] = sizes[-1]
            record["kv_fraction"] = kv_fraction_cell(results.find(EXPERIMENT, "accuracy", **where))
            for layer in layers:
                kept = results.cell(EXPERIMENT, "pairs_kept_fraction", layer=layer, **where)
                record[f"pairs_kept_{layer}"] = optional(kept)
            records.append(record)
    return Table("mqar", "Multi-query associative recall", NOTE, columns, records)


def comparison_table(results: Results) -> Table:
    """Differences of accuracy between scores at the same seeds, in each setting and size."""
    sizes = sizes_of(results)
    columns = [Column("setting", "setting"), Column("pair", "difference")]
    columns += [Column(f"difference_{size}", size, _signed_share) for size in sizes]
    columns.append(Column("difference_mean", "mean of sizes", _signed_share))
    present = [model for model in COMPARED if model in results.models]
    records = []
    for setting in settings_of(results):
        for ours, theirs in itertools.combinations(present, 2):
            record: Record = {"setting": words_for(setting), "pair": f"{ours} − {theirs}"}
            for size in sizes:
                cells = (
                    results.cell(EXPERIMENT, "accuracy", model=model, task=size, **setting)
                    for model in (ours, theirs)
                )
                record[f"difference_{size}"] = difference(*cells)
            means = (mean_over_sizes(results, model, **setting) for model in (ours, theirs))
            record["difference_mean"] = difference(*means)
            records.append(record)
    return Table(
        "mqar_paired",
        "Routing scores compared at the same seeds",
        "Difference of accuracy, paired by seed (same weights at the start, same batches).",
        columns,
        records,
    )


def mean_over_sizes(results: Results, model: str, **where: object) -> Cell:
    """Per seed the mean accuracy over all sizes (and settings that `where` leaves open).

    Seeds that lack one of the measurements that other models have are left out: a mean over fewer
    sizes or settings is another quantity.
    """
    every = results.find(EXPERIMENT, "accuracy", **where)
    wanted = {_measurement(row) for row in every if row.value is not None}
    rows = [row for row in every if row.model == model]
    have: dict[int | None, set] = defaultdict(set)
    for row in rows:
        if row.value is not None:
            have[row.seed].add(_measurement(row))
    kept = [row for row in rows if row.value is None or have[row.seed] == wanted]
    return summarise_pooled([row.model_copy(update={"n": 1}) for row in kept])


def _measurement(row: Row) -> tuple:
    return (row.task, *(row.labels[name] for name in SETTING))


def verdicts(results: Results) -> list[str]:
    """Sentences on the mean over fillers and sizes of every two scores."""
    present = [model for model in COMPARED if model in results.models]
    lines = ["# Which score?", "", RULE, ""]
    means = {model: mean_over_sizes(results, model) for model in present}
    lines += [f"- {model}: {cell_text(cell, share)}" for model, cell in means.items()]
    lines.append("")
    for ours, theirs in itertools.combinations(present, 2):
        cell = difference(means[ours], means[theirs])
        estimate = cell.estimate
        if estimate is None or estimate.low is None or estimate.n < 3:
            verdict = "not decided: fewer than three common seeds"
        elif estimate.low > 0:
            verdict = f"{ours} is better"
        elif estimate.high < 0:
            verdict = f"{theirs} is better"
        else:
            verdict = "not decided: the interval holds 0"
        lines.append(f"- {ours} − {theirs}: {cell_text(cell, _signed_share)}; {verdict}")
    return lines


def chosen_rates(rows: Sequence[Row]) -> list[str]:
    """Which learning rate each arm used in each setting, and among how many."""
    tried = {row.labels["learning_rate"] for row in rows if row.experiment == TUNING}
    used = {
        (row.model, words_for(row.labels)): row.labels["learning_rate"]
        for row in rows
        if row.experiment == EXPERIMENT
    }
    lines = [
        "# Learning rates",
        "",
        f"Chosen among {join_words([f'{rate:g}' for rate in sorted(tried)])}."
        if tried
        else "One rate for all; it was not tuned.",
        "",
    ]
    return lines + [
        f"- {model}, {setting}: {rate:g}" for (model, setting), rate in sorted(used.items())
    ]


def recall_figure(results: Results):
    """Accuracy against pairs, one panel for each filler, layout and width."""
    settings = settings_of(results)
    columns = min(2, len(settings))
    look = Look.of(results)
    lines = [
        {
            model: results.series(EXPERIMENT, "accuracy", model=model, **setting)
            for model in results.models
        }
        for setting in settings
    ]
    failed = dict(pair for panel in lines for pair in panel.items() if failed_words(dict([pair])))
    figure, panels = new_figure(
        "Associative recall by routing score",
        "share of queried keys whose value is right; thresholds frozen",
        columns=columns,
        rows=-(-len(settings) // columns),
        right=label_margin(results.models),
        gap=label_margin(results.models) + 0.25,
        titled=True,
        footer=footer_text(results, look, "bar: 95 % t interval", failed_words(failed)),
    )
    for axes, setting, models in zip(panels, settings, lines, strict=False):
        ends = {
            model: draw_points(axes, points, look.styles[model])
            for model, points in models.items()
            if points
        }
        mark_failures(axes, models, look)
        log_x_ticks(axes, results.x_values(EXPERIMENT, "accuracy", **setting))
        axes.set_ylim(-0.02, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
        axes.set_title(words_for(setting))
        axes.set_xlabel("key-value pairs")
        label_line_ends(axes, {model: end for model, end in ends.items() if end}, look)
    for axes in panels[len(settings) :]:
        axes.set_visible(False)
    return figure


def _signed_share(value: float, like: float | None = None) -> str:
    """A difference of shares in percentage points."""
    return f"{value * 100:+.1f} pp".replace("-", "−")
