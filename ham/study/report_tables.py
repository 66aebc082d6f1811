"""Tables of the study: accuracy, paired differences, what was kept, overwritten keys.

Sizes longer than the longest training example stand in tables of their own and in no mean.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ham.report.aggregate import Cell, Results, difference, kv_fraction_cell, summarise_pooled
from ham.report.formats import share
from ham.report.rows import Row
from ham.report.tables_base import Column, Record, Table, optional
from ham.study.runs import EXPERIMENT, TUNING

# Decided before the runs: each score against the others, and all against random routing.
REFERENCE = "ham-random"
COMPARED = ("ham-committed", "ham-cosine", "ham-l2", "ham-post-update", "ham-learned", REFERENCE)
SETTING = ("filler", "layout", "variant", "width")
Setting = dict[str, str | int]

NOTE = (
    "Accuracy: share of queried keys whose value is the first choice over the whole vocabulary, at "
    "tokens/pairs. KV fraction: realised share of tokens in the cache at the largest size here, "
    "mean over layers. Thresholds are frozen; learning rates were chosen on a seed that is not "
    "shown, where there was a choice."
)
ROUTING_NOTE = (
    "Recall: share of pairs of which the value that is asked for was kept, in any copy. Precision: "
    "pairs held per token kept. Slots per pair: tokens kept per pair, mean over layers; below 1 no "
    "router can hold every pair in every layer. The oracle is the upper line: it is told the "
    "values."
)
VERSION_NOTE = (
    "By how often the queried key was written. Stale answers: overwritten keys answered with the "
    "first value."
)


def completed(rows: Sequence[Row], manifest: Mapping[str, Any] | None) -> list[Row]:
    """Rows with every label of the study.

    Rows from before variants are plain, and their manifest says what lengths they trained on.
    """
    return [_complete(row, manifest) if _is_old(row) else row for row in rows]


def _is_old(row: Row) -> bool:
    return row.experiment in (EXPERIMENT, TUNING) and "variant" not in row.labels


def _complete(row: Row, manifest: Mapping[str, Any] | None) -> Row:
    labels = {"variant": "plain", **row.labels}
    if manifest is not None:
        mixture = manifest["config"]["train"]["mixture"]
        labels["training_context"] = max(size["length"] for size in mixture)
    return row.model_copy(update={"labels": labels})


def settings_of(results: Results) -> list[Setting]:
    """Every filler, layout, variant and width that occur together, plain ones first."""
    found = {
        tuple((name, row.labels[name]) for name in SETTING)
        for row in results.find(EXPERIMENT, "accuracy")
    }
    settings = [dict(setting) for setting in found]
    return sorted(
        settings,
        key=lambda one: (
            one["variant"] != "plain",
            *(one[name] for name in ("variant", "layout", "filler", "width")),
        ),
    )


def words_for(setting: Setting) -> str:
    """A setting in a few words."""
    kind = "" if plain(setting) else f", {kind_words(setting)}"
    return f"{setting['filler']} filler{kind}, d {setting['width']}"


def plain(setting: Setting) -> bool:
    """Whether the examples are Zoology's."""
    return setting["layout"] == "prefix" and setting["variant"] == "plain"


def kind_words(setting: Setting) -> str:
    """What tells the examples of a setting from those of others, filler and width aside."""
    kind, _, number = str(setting["variant"]).partition("-")
    words = ["scattered pairs"] if setting["layout"] == "scattered" else []
    if kind == "repeats":
        words.append(f"pairs read {number} times")
    if kind == "overwrites":
        words.append(f"{number} keys overwritten")
    return ", ".join(words) or "pairs first"


def beyond_training(row: Row) -> bool:
    """Whether a row was measured at a length longer than trained; rows that do not say: no."""
    context = row.labels.get("training_context")
    return context is not None and int(str(row.task).split("/")[0]) > context


def in_training(row: Row) -> bool:
    """Whether a row counts in means and comparisons."""
    return not beyond_training(row)


def sizes_of(
    results: Results, settings: Sequence[Setting], keep: Callable[[Row], bool]
) -> list[str]:
    """Every size of these settings as `length/pairs`, small first."""
    found = {
        row.task
        for setting in settings
        for row in results.find(EXPERIMENT, "accuracy", keep=keep, **setting)
    }
    return sorted(found, key=lambda task: [int(part) for part in task.split("/")])


def families(results: Results) -> list[list[Setting]]:
    """Settings that share their sizes, so that a table has no empty columns."""
    groups: dict[tuple[str, ...], list[Setting]] = defaultdict(list)
    for setting in settings_of(results):
        groups[tuple(sizes_of(results, [setting], in_training))].append(setting)
    return list(groups.values())


def accuracy_table(results: Results, settings: Sequence[Setting], *, longer: bool = False) -> Table:
    """One record for each setting and arm; `longer` has the sizes beyond the training length."""
    keep = beyond_training if longer else in_training
    sizes = sizes_of(results, settings, keep)
    columns = [Column("setting", "setting"), Column("model", "model")]
    columns += [Column(f"accuracy_{size}", size, share) for size in sizes]
    columns.append(Column("kv_fraction", "KV fraction", share))
    records = []
    for setting, model in itertools.product(settings, results.models):
        where = {"model": model, **setting}
        if not results.find(EXPERIMENT, "accuracy", keep=keep, **where):
            continue
        record: Record = {"setting": words_for(setting), "model": model}
        for size in sizes:
            cell = results.cell(EXPERIMENT, "accuracy", task=size, **where)
            record[f"accuracy_{size}"] = optional(cell)
        record["kv_fraction"] = kv_fraction_cell(
            results.find(EXPERIMENT, "accuracy", task=sizes[-1], **where)
        )
        records.append(record)
    title = "Longer than trained: not trained at this length" if longer else "Accuracy"
    return Table("mqar_longer" if longer else "mqar", title, NOTE, columns, records)


def comparison_table(results: Results, settings: Sequence[Setting]) -> Table:
    """Differences of accuracy at the same seeds, in each setting and size."""
    sizes = sizes_of(results, settings, in_training)
    columns = [Column("setting", "setting"), Column("pair", "difference")]
    columns += [Column(f"difference_{size}", size, signed_share) for size in sizes]
    columns.append(Column("difference_mean", "mean of sizes", signed_share))
    records = []
    for setting, (ours, theirs) in itertools.product(settings, compared_pairs(results.models)):
        both = [
            {size: results.cell(EXPERIMENT, "accuracy", model=model, task=size, **setting)
             for size in sizes}
            for model in (ours, theirs)
        ]  # fmt: skip
        if any(all(cell.status == "not run" for cell in cells.values()) for cells in both):
            continue
        record: Record = {"setting": words_for(setting), "pair": f"{ours} − {theirs}"}
        for size in sizes:
            cell = difference(both[0][size], both[1][size])
            record[f"difference_{size}"] = optional(cell)
        means = (mean_over_sizes(results, model, **setting) for model in (ours, theirs))
        record["difference_mean"] = difference(*means)
        records.append(record)
    return Table(
        "mqar_paired",
        "Arms compared at the same seeds",
        "Difference of accuracy, paired by seed (same weights at the start, same batches). The "
        "realised fractions differ; the table of what was kept has them.",
        columns,
        records,
    )


def compared_pairs(models: Sequence[str]) -> list[tuple[str, str]]:
    """Scores against each other, then everything else against random routing."""
    present = [model for model in COMPARED if model in models]
    pairs = list(itertools.combinations(present, 2))
    if REFERENCE in models:
        pairs += [(model, REFERENCE) for model in models if model not in COMPARED]
    return pairs


def routing_table(results: Results, settings: Sequence[Setting], *, every_size: bool) -> Table:
    """What routing layers kept, at every size or at the largest that was trained."""
    layers = results.label_values(EXPERIMENT, "pairs_kept_fraction", "layer")
    measured = {
        "pairs_kept_fraction": "recall",
        "routed_precision": "precision",
        "repeats_kept_fraction": "copies kept",
        "stale_kept_fraction": "stale kept",
    }
    metrics = {
        metric: words
        for metric, words in measured.items()
        if any(results.find(EXPERIMENT, metric, **setting) for setting in settings)
    }
    columns = [Column(name, name) for name in ("setting", "model", "size")]
    columns.append(Column("trained", "trained at this length"))
    columns.append(Column("kv_fraction", "KV fraction", share))
    columns.append(Column("slots_per_pair", "slots per pair", _two_decimals))
    columns += [
        Column(f"{metric}_{layer}", f"{words}, layer {layer + 1}", share)
        for metric, words in metrics.items()
        for layer in layers
    ]
    records = []
    for setting in settings:
        sizes = sizes_of(results, [setting], in_training)
        chosen = sizes_of(results, [setting], lambda _: True) if every_size else sizes[-1:]
        for model, size in itertools.product(results.models, chosen):
            where = {"model": model, "task": size, **setting}
            if not results.find(EXPERIMENT, "pairs_kept_fraction", **where):
                continue
            rows = results.find(EXPERIMENT, "accuracy", **where)
            record: Record = {"setting": words_for(setting), "model": model, "size": size}
            record["trained"] = "yes" if size in sizes else "no"
            if any("training_context" not in row.labels for row in rows):
                record["trained"] = "not stated"
            record["kv_fraction"] = kv_fraction_cell(rows)
            record["slots_per_pair"] = kv_fraction_cell([_slots_per_pair(row) for row in rows])
            for metric, layer in itertools.product(metrics, layers):
                cell = results.cell(EXPERIMENT, metric, layer=layer, **where)
                record[f"{metric}_{layer}"] = optional(cell)
            records.append(record)
    return Table("mqar_routing", "What was kept", ROUTING_NOTE, columns, records)


def version_table(results: Results, *, every_size: bool) -> Table:
    """Accuracy where keys were overwritten, by version; no records without such rows."""
    metrics = {
        "accuracy_once": "written once",
        "accuracy_overwritten": "overwritten",
        "stale_answer_fraction": "stale answers",
    }
    columns = [Column(name, name) for name in ("setting", "model", "size")]
    columns += [Column(metric, words, share) for metric, words in metrics.items()]
    records = []
    for setting in settings_of(results):
        keep = (lambda _: True) if every_size else in_training
        for model, size in itertools.product(results.models, sizes_of(results, [setting], keep)):
            where = {"model": model, "task": size, **setting}
            if results.find(EXPERIMENT, "accuracy_overwritten", **where):
                cells = {m: optional(results.cell(EXPERIMENT, m, **where)) for m in metrics}
                records.append(
                    {"setting": words_for(setting), "model": model, "size": size, **cells}
                )
    return Table("mqar_versions", "Overwritten keys", VERSION_NOTE, columns, records)


def mean_over_sizes(results: Results, model: str, **where: object) -> Cell:
    """Per seed the mean accuracy over all trained sizes (and settings that `where` leaves open).

    Seeds that lack one of the measurements that other models have are left out: a mean over fewer
    sizes or settings is another quantity.
    """
    every = results.find(EXPERIMENT, "accuracy", keep=in_training, **where)
    wanted = {_measurement(row) for row in every if row.value is not None}
    rows = [row for row in every if row.model == model]
    have: dict[int | None, set] = defaultdict(set)
    for row in rows:
        if row.value is not None:
            have[row.seed].add(_measurement(row))
    kept = [row for row in rows if row.value is None or have[row.seed] == wanted]
    return summarise_pooled([row.model_copy(update={"n": 1}) for row in kept])


def signed_share(value: float, like: float | None = None) -> str:
    """A difference of shares in percentage points."""
    return f"{value * 100:+.1f} pp".replace("-", "−")


def _measurement(row: Row) -> tuple:
    return (row.task, *(row.labels[name] for name in SETTING))


def _slots_per_pair(row: Row) -> Row:
    """The row with tokens kept per pair in place of its fraction."""
    if row.kv_fraction is None:
        return row
    length, pairs = (int(part) for part in str(row.task).split("/"))
    return row.model_copy(update={"kv_fraction": row.kv_fraction * length / pairs})


def _two_decimals(value: float, like: float | None = None) -> str:
    return f"{value:.2f}"
