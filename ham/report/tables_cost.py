"""Tables of cost: throughput and memory."""

from __future__ import annotations

from collections.abc import Callable

from ham.report import formats
from ham.report.aggregate import Results, or_failure, with_spread_of_time
from ham.report.plots_cost import main_batch
from ham.report.rows import Row
from ham.report.speed_words import launch_words
from ham.report.tables_base import MODEL, Column, Record, Table, models_of, optional

SPEED_COLUMNS = (
    ("train", "training step", "training_step_ms", "ms"),
    ("prefill", "prefill", "prefill_ms", "ms"),
    ("decode", "decode", "decode_ms", "ms per token"),
)
MEMORY_KINDS = ("kv", "positions", "page_table", "free_pages", "recurrent", "conv")


def throughput(results: Results) -> Table:
    """Times and rates per context, with provider, launch mode and device."""
    columns = [
        MODEL,
        Column("context", "context (tokens)", formats.count),
        Column("batch_size", "batch", formats.count),
        Column("provider", "provider"),
        Column("launch_mode", "launch"),
    ]
    for task, title, _, unit in SPEED_COLUMNS:
        columns.append(Column(f"{task}_ms", f"{title} ({unit})", formats.significant))
        columns.append(Column(f"{task}_tokens_per_second", f"{title} (tokens/s)", formats.count))
    columns.append(Column("device", "device"))
    note = "Medians of the timed repetitions; brackets hold the 20th and 80th percentile."
    launched = launch_words(results)
    title = f"Throughput, {launched}" if launched else "Throughput"
    return Table("throughput", title, note, columns, _speed_records(results))


def _speed_records(results: Results) -> list[Record]:
    # Failed rows carry no batch size; they belong to the one that was configured.
    usual = main_batch(results)
    records: list[Record] = []
    for model in models_of(results, "throughput"):
        groups = {
            (row.x_value, row.labels.get("batch_size", usual), *_variant(row))
            for row in results.rows
            if row.experiment == "throughput" and row.model == model and row.x_value is not None
        }
        for x, batch, *variant in sorted(groups, key=str):
            record: Record = {"model": model, "context": x, "batch_size": batch}
            record |= dict(zip(("provider", "launch_mode", "device"), variant, strict=True))
            keep = _keep(batch, usual, variant)
            for task, _, metric, _ in SPEED_COLUMNS:
                where = {"model": model, "task": task, "x": x, "keep": keep}
                time = results.cell("throughput", metric, **where)
                rate = results.cell("throughput", "tokens_per_second", **where)
                record[f"{task}_ms"] = or_failure(time, rate)
                rate = with_spread_of_time(or_failure(rate, time), time)
                record[f"{task}_tokens_per_second"] = rate
            records.append(record)
    return sorted(records, key=lambda r: (results.models.index(r["model"]), r["context"]))


def _variant(row: Row) -> tuple[str, str, str]:
    return (row.provider, row.launch_mode.replace("_", " "), row.device)


def _keep(batch: object, usual: object, variant: list[str]) -> Callable[[Row], bool]:
    return lambda row: (
        _variant(row) == tuple(variant) and row.labels.get("batch_size", usual) == batch
    )


def memory(results: Results) -> Table:
    """Bytes of the decoding cache by kind, and peaks, per context."""
    kinds = [kind for kind in MEMORY_KINDS if results.find("memory", f"{kind}_bytes")]
    columns = [
        MODEL,
        Column("context", "context (tokens)", formats.count),
        Column("allocated", "cache allocated", formats.byte_size),
        Column("used", "of it used", formats.byte_size),
        Column("declared", "declared", formats.byte_size),
        *(Column(kind, kind.replace("_", " "), formats.byte_size) for kind in kinds),
        Column("peak_prefill", "peak, prefill", formats.byte_size),
        Column("peak_train", "peak, training step", formats.byte_size),
    ]
    metrics = {
        "allocated": ("cache_bytes_allocated", "decode"),
        "used": ("cache_bytes_used", "decode"),
        "declared": ("declared_bytes", "decode"),
        **{kind: (f"{kind}_bytes", "decode") for kind in kinds},
        "peak_prefill": ("peak_memory_bytes", "prefill"),
        "peak_train": ("peak_memory_bytes", "train"),
    }
    records: list[Record] = []
    for model in models_of(results, "memory"):
        contexts = {
            row.x_value
            for row in results.rows
            if row.experiment == "memory" and row.model == model and row.x_name == "context"
        }
        for x in sorted(contexts):
            record: Record = {"model": model, "context": x}
            metric, task = metrics["allocated"]
            allocated = results.cell("memory", metric, model=model, task=task, x=x)
            for key, (metric, task) in metrics.items():
                cell = results.cell("memory", metric, model=model, task=task, x=x)
                if key not in kinds:
                    cell = or_failure(cell, allocated)
                record[key] = optional(cell) if key in (*kinds, "declared") else cell
            records.append(record)
    undeclared = any(record["declared"] is None for record in records)
    note = (
        "Counted on the real tensors per sequence; “declared” is what the model's own formula "
        "says. A dash: the model has no such memory"
        + (", or is of another library and declares nothing." if undeclared else ".")
    )
    return Table("memory", "Memory", note, columns, records)
