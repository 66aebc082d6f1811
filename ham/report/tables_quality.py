"""Tables of quality: language modelling, lm-eval, recall, dial, training."""

from __future__ import annotations

from ham.report import formats
from ham.report.aggregate import (
    NOT_RUN,
    SHARED_TIMES,
    Cell,
    Results,
    difference,
    kv_fraction_cell,
    or_failure,
)
from ham.report.tables_base import (
    MODEL,
    Column,
    Record,
    Table,
    chance_level,
    models_of,
    optional,
)

CLASSES = {
    "recall": "recalled",
    "other": "other",
    "recall_rare": "recalled and rare",
    "rare": "rare",
    "frequent": "frequent",
}
"""Titles of the classes of `ham.evaluate.word_classes`."""


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


def token_classes(results: Results) -> Table:
    """Bits per byte of each class of word, with what recalled words save."""
    metric = "class_bits_per_byte"
    columns = [
        MODEL,
        Column("context", "context (tokens)", formats.count),
        *(Column(name, title, formats.bits) for name, title in CLASSES.items()),
        Column("difference", "Δ recalled to other", formats.signed_bits),
    ]
    records: list[Record] = []
    for model in models_of(results, "language_modelling", "bits_per_byte"):
        for x in results.x_values("language_modelling", metric):
            where = {"model": model, "x": x}
            whole = results.cell("language_modelling", "bits_per_byte", **where)
            cells = {}
            for name in CLASSES:
                cell = results.cell("language_modelling", metric, token_class=name, **where)
                cells[name] = or_failure(cell, whole)
            if all(cell.status == "not run" for cell in cells.values()):
                continue
            gap = difference(cells["recall"], cells["other"])
            records.append({"model": model, "context": x, **cells, "difference": gap})
    note = (
        "Bits per byte of words by what the model could know of them. Recalled: the word and the "
        "one before it stood side by side earlier in the window. Rare: the least frequent words "
        "that make up the declared share of the training text." + _class_shares(results)
    )
    return Table("token_classes", "Classes of words", note, columns, records)


def _class_shares(results: Results) -> str:
    """How many of the classed bytes each class holds, which is the same for every model."""
    sizes = {
        name: results.pooled_cell("language_modelling", "class_bytes", token_class=name).value
        for name in CLASSES
    }
    whole = (sizes["recall"] or 0.0) + (sizes["other"] or 0.0)
    if not whole:
        return ""
    parts = [
        f"{CLASSES[name]} {formats.share((size or 0.0) / whole)}" for name, size in sizes.items()
    ]
    return f" Share of the bytes: {formats.join_words(parts)}."


def lm_eval(results: Results) -> Table:
    """Every metric of every lm-eval task beside what a uniform and an untrained model get."""
    references = ("chance_", "untrained_")
    rows = [row for row in results.rows if row.experiment == "lm_eval"]
    columns = [
        MODEL,
        Column("task", "task"),
        Column("metric", "metric"),
        Column("value", "value", formats.scientific),
        Column("chance", "chance", formats.scientific),
    ]
    if any(row.metric.startswith("untrained_") for row in rows):
        columns.append(Column("untrained", "untrained", formats.scientific))
    if any(row.labels.get("truncated") for row in rows):
        columns.append(Column("truncated", "requests cut", formats.count))
    records: list[Record] = []
    pairs = {(row.task or "", row.metric) for row in rows if not row.metric.startswith(references)}
    for task, metric in sorted(pairs):
        if _repeats_accuracy(results, task, metric):
            continue
        for model in results.models:
            where = {"model": model, "task": task or None}
            cell = results.cell("lm_eval", metric, **where)
            cut = [row.labels["truncated"] for row in cell.rows if "truncated" in row.labels]
            records.append(
                {
                    "model": model,
                    "task": task,
                    "metric": metric,
                    "value": cell,
                    "chance": chance_level(results, task, metric),
                    "untrained": optional(results.cell("lm_eval", f"untrained_{metric}", **where)),
                    "truncated": max(cut, default=None),
                }
            )
    note = "Accuracies are shares in 0..1; zero-shot, all tasks of a model in one process."
    if len(columns) > 5:
        note += (
            " Chance: a model that gives every token the same probability. Untrained: the model "
            "before its first step. Cut: the context was longer than the model's input and lost "
            "its beginning."
        )
    return Table("lm_eval", "lm-eval tasks", note, columns, records)


def _repeats_accuracy(results: Results, task: str, metric: str) -> bool:
    """Whether normalising by length changed no answer: choices of one length."""
    if metric != "accuracy_norm":
        return False
    plain, normed = (
        {(row.model, row.seed): row.value for row in results.find("lm_eval", name, task=task)}
        for name in ("accuracy", metric)
    )
    return plain == normed


def recall(results: Results) -> Table:
    """Recall accuracy against the number of pairs, with the share kept of these documents."""
    pairs = results.x_values("recall", "accuracy")
    columns, records = [MODEL], []
    for x in pairs:
        columns.append(Column(f"pairs_{x:g}", f"{x:g} pairs", formats.share))
        columns.append(Column(f"kept_{x:g}", f"KV fraction, {x:g} pairs", formats.share))
    for model in models_of(results, "recall", "accuracy"):
        record: Record = {"model": model}
        for x in pairs:
            cell = results.cell("recall", "accuracy", model=model, x=x)
            record[f"pairs_{x:g}"], record[f"kept_{x:g}"] = cell, kept_of(cell)
        records.append(record)
    columns = [column for column in columns if _has_number(records, column.key)]
    note = (
        "Share of queried keys whose value is recalled exactly, and of the tokens of these "
        "documents how many were really kept, which is not the share of text."
    )
    return Table("recall", "Associative recall", note, columns, records)


def kept_of(cell: Cell) -> Cell | None:
    """The realised KV fraction of a cell's own documents; None for a model without one."""
    return None if cell.value is None else kv_fraction_cell(cell.rows)


def _has_number(records: list[Record], key: str) -> bool:
    """A column that no model fills is left out."""
    return any(record[key] is not None for record in records)


DIAL_DETAILS = (
    Column("needle_accuracy", "needle accuracy", formats.share),
    Column("recall_accuracy", "recall accuracy", formats.share),
    Column("kv_bytes", "keys and values", formats.byte_size),
    Column("cache_bytes_allocated", "decoding memory", formats.byte_size),
    Column("decode_ms", "decode (ms per token)", formats.significant),
)


def dial(results: Results) -> Table:
    """Loss, accuracies, bytes and time for each target of the dial, with what was really routed."""
    shared = results.shared_gpu()
    details = [
        column
        for column in DIAL_DETAILS
        if results.find("dial", column.key) and not (shared and column.key == "decode_ms")
    ]
    columns = [
        MODEL,
        Column("target_fraction", "target fraction", formats.share),
        Column("kv_fraction", "realised KV fraction", formats.share),
        Column("bits_per_byte", "bits per byte", formats.bits),
        Column("difference", "Δ to the smallest target", formats.signed_bits),
        *details,
    ]
    records: list[Record] = []
    for model in models_of(results, "dial", "bits_per_byte"):
        points = results.series("dial", "bits_per_byte", model=model)
        for point in points:
            first = points[0].cell
            record: Record = {
                "model": model,
                "target_fraction": point.x,
                "kv_fraction": kv_fraction_cell(point.cell.rows),
                "bits_per_byte": point.cell,
                "difference": None if point is points[0] else difference(point.cell, first),
            }
            for column in details:
                record[column.key] = results.cell("dial", column.key, model=model, x=point.x)
            records.append(record)
    note = "One trained model per line group; thresholds recalibrated and frozen, no retraining."
    if details:
        note += " The realised fraction is that of the text; bytes and times have their own."
    if shared:
        note += f" {SHARED_TIMES}"
    return Table("dial", "The dial", note, columns, records)


def generalisation(results: Results) -> Table:
    """How much better the text that was trained on is predicted than held-out text."""
    columns = [
        MODEL,
        Column("epochs", "passes over the corpus", formats.significant),
        Column("training_loss", "text trained on (nats)", formats.bits),
        Column("validation_loss", "held-out text (nats)", formats.bits),
        Column("gap", "gap", formats.signed_bits),
    ]
    records: list[Record] = []
    measured = results.find("train", "loss_nats", task="training_text")
    for model in models_of(results, "train") if measured else ():
        seen, held_out = (
            points[-1].cell if points else NOT_RUN
            for points in (
                results.series("train", "loss_nats", model=model, task=task)
                for task in ("training_text", "validation")
            )
        )
        records.append(
            {
                "model": model,
                "epochs": or_failure(results.cell("train", "corpus_epochs", model=model), held_out),
                "training_loss": or_failure(seen, held_out),
                "validation_loss": held_out,
                "gap": difference(held_out, seen),
            }
        )
    note = (
        "Loss per token after training, on windows of both splits without recall documents. A gap "
        "is what a model knows by heart, and the difference between the texts."
    )
    return Table("generalisation", "Seen and held-out text", note, columns, records)


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
    note = "The last logged step of each run." + _shared_note(results)
    return Table("training", "Training", note, columns, records)


def _shared_note(results: Results) -> str:
    """That speeds are of a shared GPU, where they are."""
    numbers = " or ".join(map(str, results.shared_gpu()))
    if not numbers:
        return ""
    return f" Speeds and times are those of {numbers} processes at a time on one GPU."
