"""Tables of quality: language modelling, lm-eval, recall, dial, training."""

from __future__ import annotations

from ham.report import formats
from ham.report.aggregate import NOT_RUN, Results, difference, kv_fraction_cell, or_failure
from ham.report.tables_base import (
    MODEL,
    Column,
    Record,
    Table,
    chance_level,
    models_of,
    optional,
)


def language_modelling(results: Results) -> Table:
    """Bits per byte and realised KV fraction, per context and layer."""
    contexts = results.x_values("language_modelling", "bits_per_byte")
    layers = results.label_values("language_modelling", "kv_fraction", "layer")
    columns = [
        MODEL,
        Column("context", "context (tokens)", formats.count),
        Column("bits_per_byte", "bits per byte", formats.bits),
        Column("kv_fraction", "realised KV fraction", formats.share),
        *(Column(f"kv_layer_{layer}", f"layer {layer}", formats.share) for layer in layers),
    ]
    records: list[Record] = []
    for model in models_of(results, "language_modelling", "bits_per_byte"):
        for x in contexts:
            cell = results.cell("language_modelling", "bits_per_byte", model=model, x=x)
            record: Record = {"model": model, "context": x, "bits_per_byte": cell}
            record["kv_fraction"] = kv_fraction_cell(cell.rows)
            for layer in layers:
                record[f"kv_layer_{layer}"] = optional(
                    results.cell("language_modelling", "kv_fraction", model=model, x=x, layer=layer)
                )
            records.append(record)
    note = "Held-out test documents; the KV fraction is what the frozen thresholds really routed."
    return Table("language_modelling", "Language modelling", note, columns, records)


def lm_eval(results: Results) -> Table:
    """Every metric of every lm-eval task, with chance beside accuracies."""
    columns = [
        MODEL,
        Column("task", "task"),
        Column("metric", "metric"),
        Column("value", "value", formats.significant),
        Column("chance", "chance", formats.significant),
    ]
    records: list[Record] = []
    pairs = sorted(
        {
            (row.task or "", row.metric)
            for row in results.rows
            if row.experiment == "lm_eval" and not row.metric.startswith("chance_")
        }
    )
    for task, metric in pairs:
        for model in results.models:
            cell = results.cell("lm_eval", metric, model=model, task=task or None)
            chance = chance_level(results, task, metric)
            records.append(
                {"model": model, "task": task, "metric": metric, "value": cell, "chance": chance}
            )
    note = "Accuracies are shares in 0..1; zero-shot, all tasks of a model in one process."
    return Table("lm_eval", "lm-eval tasks", note, columns, records)


def recall(results: Results) -> Table:
    """Recall accuracy against the number of pairs."""
    pairs = results.x_values("recall", "accuracy")
    columns = [MODEL, *(Column(f"pairs_{x:g}", f"{x:g} pairs", formats.share) for x in pairs)]
    records: list[Record] = [
        {
            "model": model,
            **{f"pairs_{x:g}": results.cell("recall", "accuracy", model=model, x=x) for x in pairs},
        }
        for model in models_of(results, "recall", "accuracy")
    ]
    note = "Share of queried keys whose value is recalled exactly."
    return Table("recall", "Associative recall", note, columns, records)


def dial(results: Results) -> Table:
    """Bits per byte for each target of the dial, with what was really routed."""
    columns = [
        MODEL,
        Column("target_fraction", "target fraction", formats.share),
        Column("kv_fraction", "realised KV fraction", formats.share),
        Column("bits_per_byte", "bits per byte", formats.bits),
        Column("difference", "Δ to the smallest target", formats.signed_bits),
    ]
    records: list[Record] = []
    for model in models_of(results, "dial", "bits_per_byte"):
        points = results.series("dial", "bits_per_byte", model=model)
        for point in points:
            first = points[0].cell
            records.append(
                {
                    "model": model,
                    "target_fraction": point.x,
                    "kv_fraction": kv_fraction_cell(point.cell.rows),
                    "bits_per_byte": point.cell,
                    "difference": None if point is points[0] else difference(point.cell, first),
                }
            )
    note = "One trained model per line group; thresholds recalibrated and frozen, no retraining."
    return Table("dial", "The dial", note, columns, records)


def training(results: Results) -> Table:
    """Final losses and cost of the training runs."""
    columns = [
        MODEL,
        Column("parameters", "parameters", formats.parameters),
        Column("steps", "steps", formats.count),
        Column("train_loss", "last training loss (nats)", formats.bits),
        Column("validation_loss", "last validation loss (nats)", formats.bits),
        Column("tokens_per_second", "tokens/s", formats.count),
        Column("wall_seconds", "wall time (s)", formats.significant),
        Column("peak_memory_bytes", "peak memory", formats.byte_size),
    ]
    records: list[Record] = []
    for model in models_of(results, "train"):
        record: Record = {"model": model, "parameters": results.parameters(model)}
        for task in ("train", "validation"):
            points = results.series("train", "loss_nats", model=model, task=task)
            record[f"{task}_loss"] = points[-1].cell if points else NOT_RUN
            if task == "train":
                record["steps"] = points[-1].x if points else None
        for metric in ("tokens_per_second", "wall_seconds", "peak_memory_bytes"):
            cell = results.cell("train", metric, model=model)
            record[metric] = or_failure(cell, record["train_loss"])
        records.append(record)
    note = "The last logged step of each run."
    return Table("training", "Training", note, columns, records)
