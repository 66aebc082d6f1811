"""The comparison table, and the list of all tables.

`table_format` writes them as Markdown, CSV, LaTeX and HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ham.report import (
    formats,
    tables_cost,
    tables_needle,
    tables_quality,
    tables_routing,
    tables_tradeoff,
    tables_tuning,
)
from ham.report.aggregate import (
    NOT_RUN,
    Cell,
    Results,
    difference,
    kv_fraction_cell,
    or_failure,
    summarise,
    summarise_pooled,
)
from ham.report.plots_base import Look
from ham.report.plots_cost import cache_cell, main_variant, speed_points
from ham.report.plots_language import main_context, quality_cell, unigram_cell
from ham.report.plots_tradeoff import memory_context
from ham.report.speed_words import launch_words
from ham.report.tables_base import MODEL, Column, Record, Table, chance_level

REFERENCE_MODEL = "transformer"
MAX_TASK_COLUMNS = 4
HEADLINE = (
    "model",
    "parameters",
    "bits_per_byte",
    "bits_per_byte_difference",
    "kv_fraction",
    "needle_accuracy",
    "recall_accuracy",
    "cache_bytes_allocated",
    "decode_ms",
)
DETAIL_TABLES: dict[str, Callable[[Results], Table]] = {
    "language_modelling": tables_quality.language_modelling,
    "token_classes": tables_quality.token_classes,
    "lm_eval": tables_quality.lm_eval,
    "needle": tables_needle.needle,
    "needle_routed": tables_needle.needle_routed,
    "recall": tables_quality.recall,
    "dial": tables_quality.dial,
    "throughput": tables_cost.throughput,
    "memory": tables_cost.memory,
    "training": tables_quality.training,
}

PARTS_OF_TABLES = {"needle_routed": "needle", "token_classes": "language_modelling"}
"""Tables that add detail to another, which already says that nothing was run."""


def all_tables(
    results: Results, look: Look, notes: Mapping[str, str] | None = None
) -> tuple[list[Table], dict[str, str]]:
    """Every table that has rows, and the names and titles of those that were not run.

    Learning rates are tried only where the configuration says so, not every run has models of equal
    memory, and earlier ones did not measure the loss on text that they had seen, gates, or whether
    decoding decides alike: none of these is ever "not run".

    Args:
        results: The rows.
        look: How models are drawn, and the main context.
        notes: What captions say besides, by the name of the table.
    """
    tables, skipped = [comparison(results, look)], {}
    for name, make in DETAIL_TABLES.items():
        table = make(results)
        if table.records:
            tables.append(table)
        else:
            skipped[name] = table.title
    for table in (
        tables_tradeoff.equal_bytes(results, look),
        tables_quality.generalisation(results),
        tables_tuning.tuning(results),
        tables_routing.gates(results),
        tables_routing.agreement(results),
    ):
        if table.records:
            tables.append(table)
    return [_noted(table, (notes or {}).get(table.name, "")) for table in tables], skipped


def _noted(table: Table, note: str) -> Table:
    return replace(table, note=f"{table.note} {note}") if note else table


def comparison(results: Results, look: Look) -> Table:
    """One line a model with the main result of every stage."""
    context = memory_context(results)
    speed = _longest(results, "throughput")
    tasks = _accuracy_columns(results)
    columns = [
        MODEL,
        Column("parameters", "parameters", formats.parameters),
        Column("bits_per_byte", "bits per byte", formats.bits),
        Column("bits_per_byte_difference", f"Δ to {REFERENCE_MODEL}", formats.signed_bits),
        Column("kv_fraction", "realised KV fraction", formats.share),
        Column("needle_accuracy", "needle accuracy", formats.share),
        Column("recall_accuracy", "recall accuracy", formats.share),
        *tasks,
        Column("cache_bytes_allocated", f"cache{_at(context)}", formats.byte_size),
        Column("prefill_tokens_per_second", f"prefill{_at(speed)} (tokens/s)", formats.count),
        Column("decode_ms", f"decode{_at(speed)} (ms per token)", formats.significant),
        Column("training_step_ms", f"training step{_at(speed)} (ms)", formats.significant),
        Column("training_tokens_per_second", "training run (tokens/s)", formats.count),
    ]
    records = [
        _comparison_record(results, look, model, tasks, context, speed) for model in results.models
    ]
    return Table(
        "comparison",
        "Comparison",
        _comparison_note(results, look),
        columns,
        records,
        headline=HEADLINE,
    )


def _comparison_record(
    results: Results,
    look: Look,
    model: str,
    tasks: Sequence[Column],
    context: float | None,
    speed: float | None,
) -> Record:
    quality = quality_cell(results, look, model)
    reference = quality_cell(results, look, REFERENCE_MODEL)
    record: Record = {
        "model": model,
        "parameters": results.parameters(model),
        "bits_per_byte": quality,
        "bits_per_byte_difference": _difference(model, quality, reference),
        "kv_fraction": kv_fraction_cell(quality.rows),
        "needle_accuracy": results.pooled_cell("needle", "accuracy", model=model),
        "recall_accuracy": results.pooled_cell("recall", "accuracy", model=model),
        "cache_bytes_allocated": cache_cell(results, model, context),
        "prefill_tokens_per_second": _rate(results, model, "prefill", speed),
        "decode_ms": _time(results, model, "decode", "decode_ms", speed),
        "training_step_ms": _time(results, model, "train", "training_step_ms", speed),
        "training_tokens_per_second": or_failure(
            results.cell("train", "tokens_per_second", model=model),
            summarise_pooled(results.find("train", "loss_nats", model=model)),
        ),
    }
    for column in tasks:
        found = results.find("lm_eval", "accuracy", model=model)
        if column.key == "lm_eval_accuracy":
            record[column.key] = summarise_pooled(found)
        else:
            task = column.key.removeprefix("lm_eval_")
            record[column.key] = summarise([row for row in found if row.task == task])
    return record


def _comparison_note(results: Results, look: Look) -> str:
    context = main_context(results, look)
    parts = []
    if context is not None:
        parts.append(f"Bits per byte and KV fraction at a context of {context:,.0f} tokens.")
    unigram = unigram_cell(results).value
    if unigram is not None:
        parts.append(f"A unigram model needs {formats.bits(unigram)} bits per byte.")
    parts.append("Needle and recall accuracy are means over their whole grids.")
    launched = launch_words(results)
    if launched:
        parts.append(f"Decoding, prefill and training step: {launched}.")
    return " ".join(parts)


def _accuracy_columns(results: Results) -> list[Column]:
    """One column a task with its chance level; one mean column when there are many tasks."""
    tasks = results.tasks("lm_eval", "accuracy")
    if len(tasks) > MAX_TASK_COLUMNS:
        chances = [chance_level(results, task) for task in tasks]
        known = [chance for chance in chances if chance is not None]
        mean = f", chance {formats.share(sum(known) / len(known))}" if known else ""
        title = f"lm-eval accuracy (mean of {len(tasks)} tasks{mean})"
        return [Column("lm_eval_accuracy", title, formats.share)]
    columns = []
    for task in tasks:
        chance = chance_level(results, task)
        beside = "" if chance is None else f" (chance {formats.share(chance)})"
        columns.append(
            Column(f"lm_eval_{task}", f"{task.replace('_', ' ')}{beside}", formats.share)
        )
    return columns


def _difference(model: str, cell: Cell, reference: Cell) -> Cell | None:
    if model == REFERENCE_MODEL:
        return None
    return difference(cell, reference)


def _rate(results: Results, model: str, task: str, x: float | None) -> Cell:
    points = speed_points(results, model, task)
    return next((point.cell for point in points if point.x == x), NOT_RUN)


def _time(results: Results, model: str, task: str, metric: str, x: float | None) -> Cell:
    keep = main_variant(results, model, "throughput", task)
    return results.cell("throughput", metric, model=model, task=task, x=x, keep=keep)


def _longest(results: Results, experiment: str) -> float | None:
    """The longest context that was measured or failed."""
    values = [
        row.x_value
        for row in results.rows
        if row.experiment == experiment and row.x_name == "context" and row.x_value is not None
    ]
    return max(values, default=None)


def _at(x: float | None) -> str:
    return "" if x is None else f" at {x:,.0f}"
