"""Tables of needles: accuracy by task, length and depth, and routed against answered."""

from __future__ import annotations

from ham.report import formats
from ham.report.aggregate import Results
from ham.report.needle_seeds import HALF
from ham.report.tables_base import MODEL, Column, Record, Table, models_of, optional

TASK = Column("task", "task")


def needle(results: Results) -> Table:
    """Needle accuracy per task, length and depth; one line a task and length."""
    depths = results.label_values("needle", "accuracy", "depth")
    tasks = results.tasks("needle", "accuracy")
    columns = [
        MODEL,
        *([TASK] if len(tasks) > 1 else []),
        Column("length", "length (tokens)", formats.count),
        *(
            Column(f"depth_{depth:g}", f"depth {depth * 100:g} %", formats.share)
            for depth in depths
        ),
        Column("mean", "mean over depths", formats.share),
        Column("seeds_found", "seeds that find more than half"),
        *_if_there(results, "string_match_all", "generated", "found in generated text"),
        Column("kept", "needle tokens kept", formats.share),
        *_left_out_column(results),
    ]
    records: list[Record] = []
    for model in models_of(results, "needle", "accuracy"):
        for task in tasks:
            for x in results.x_values("needle", "accuracy", task=task):
                records.append(_needle_record(results, depths, model, task, x))
    note = "Share of needles whose answer tokens are all right; depth 0 is the start of the text."
    if len(tasks) > 1:
        note += " Tasks of several answers count as right if all are, and have random depths."
    return Table("needle", "Needle in a haystack", note, columns, records)


def _needle_record(
    results: Results, depths: list[float], model: str, task: str, x: float
) -> Record:
    where = {"model": model, "task": task, "x": x}
    record: Record = {"model": model, "task": task, "length": x}
    has_depth = bool(results.label_values("needle", "accuracy", "depth", task=task))
    for depth in depths:
        cell = results.cell("needle", "accuracy", depth=depth, **where) if has_depth else None
        record[f"depth_{depth:g}"] = cell
    record["mean"] = results.pooled_cell("needle", "accuracy", **where)
    found = [value > HALF for _, value in record["mean"].by_seed]
    record["seeds_found"] = f"{sum(found)} of {len(found)}" if found else None
    record["generated"] = optional(results.pooled_cell("needle", "string_match_all", **where))
    record["kept"] = optional(results.pooled_cell("needle", "kept_fraction", **where))
    record["left_out"] = sum(
        int(row.value or 0) for row in results.find("needle", "samples_left_out", **where)
    )
    return record


def needle_routed(results: Results) -> Table:
    """Share of needles routed in at least k layers, and how many of them were answered."""
    columns = [
        MODEL,
        TASK,
        Column("min_layers", "routed in at least (layers)", formats.count),
        Column("count", "needles, all seeds", formats.count),
        Column("routed", "of all", formats.share),
        Column("answered", "answered, of these", formats.share),
        Column("otherwise", "answered, of the others", formats.share),
        *_if_there(results, "string_match_if_routed", "generated", "generated, of these"),
    ]
    records: list[Record] = []
    tasks = results.tasks("needle", "needles_routed")
    for model in models_of(results, "needle", "needles_routed"):
        for task in [*([None] if len(tasks) > 1 else []), *tasks]:
            where = {"model": model, **({} if task is None else {"task": task})}
            for least in results.label_values("needle", "needles_routed", "min_layers", **where):
                here = {**where, "min_layers": least}
                record: Record = {"model": model, "task": task or "all", "min_layers": least}
                for key, metric in (
                    ("routed", "needles_routed"),
                    ("answered", "accuracy_if_routed"),
                    ("otherwise", "accuracy_if_not_routed"),
                    ("generated", "string_match_if_routed"),
                ):
                    record[key] = optional(results.pooled_cell("needle", metric, **here))
                record["count"] = sum(
                    round(row.value * row.n)
                    for row in results.find("needle", "needles_routed", **here)
                    if row.value is not None
                )
                records.append(record)
    note = (
        "Each answer by itself, over all lengths and depths. A needle is routed in a layer if at "
        "least half of the tokens of its value entered that layer's cache."
    )
    return Table("needle_routed", "Routed and answered", note, columns, records)


def _if_there(results: Results, metric: str, key: str, title: str) -> list[Column]:
    return [Column(key, title, formats.share)] if results.find("needle", metric) else []


def _left_out_column(results: Results) -> list[Column]:
    """Only where something was left out: samples beyond the model's range."""
    if not any(row.value for row in results.find("needle", "samples_left_out")):
        return []
    return [Column("left_out", "samples too long, left out", formats.count)]
