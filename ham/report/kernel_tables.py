"""Tables of kernel speed: one for each operation."""

from __future__ import annotations

from collections.abc import Iterable

from ham.kernels.speed.targets import OURS
from ham.report.formats import byte_size, reason, share, significant
from ham.report.kernel_cells import (
    EAGER,
    GRAPH,
    MODE_WORDS,
    OPERATION_WORDS,
    Place,
    SpeedRows,
    is_right,
    label,
    number,
)
from ham.report.rows import Row
from ham.report.tables_base import Column, Entry, Record, Table

NOTE = (
    "Medians with 20th and 80th percentile, L2 cache cleared before every call. `triton` is this "
    "project's; the factor says how many times faster it is than the line's provider. The floor is "
    "max(FLOPs / matmul rate, bytes / copy rate) with rates of the same run; the share is that of "
    "the CUDA graph where there is one, else of the eager call. A provider was compared with "
    "float64 on the timed tensors, outputs and every gradient, before it was timed."
)
LEGEND = "A dash: no number. WRONG: timed on request although the result is wrong."
TEXT = [
    Column("shape", "shape"),
    Column("routed", "routed"),
    Column("mode", "mode"),
    Column("provider", "provider"),
    Column("eager", "eager, ms"),
    Column("graph", "CUDA graph, ms"),
    Column("times_faster", "triton is faster ×", significant),
    Column("floor_ms", "floor, ms", significant),
    Column("of_floor", "of floor", share),
    Column("memory", "peak extra memory", byte_size),
    Column("error", "largest error"),
    Column("note", "result"),
]
NUMBERS = [
    Column(key, key)
    for key in (
        "operation",
        "shape",
        "fraction",
        "kv_fraction",
        "mode",
        "provider",
        "eager_ms",
        "eager_p20_ms",
        "eager_p80_ms",
        "graph_ms",
        "graph_p20_ms",
        "graph_p80_ms",
        "n",
        "times_faster",
        "graph_times_faster",
        "floor_ms",
        "floor_bound",
        "of_floor",
        "peak_bytes",
        "max_relative_error",
        "worst_tensor",
        "correct",
        "score",
        "score_mean_absolute_error",
        "decisions_flipped",
        "guard",
        "eager_error",
        "graph_error",
    )
]


def speed_tables(rows: Iterable[Row], numbers: bool = False) -> list[Table]:
    """A table for each operation with times; `numbers` gives the columns for programs."""
    found = SpeedRows(rows)
    tables = [_operation_table(found, operation, numbers) for operation in found.operations()]
    return [table for table in tables if table.records]


def _operation_table(rows: SpeedRows, operation: str, numbers: bool) -> Table:
    records = [
        _record(rows, place, provider, mode)
        for place in rows.places
        if place.operation == operation
        for mode in rows.modes(place)
        for provider in rows.providers(place)
    ]
    routed = any(record["fraction"] is not None for record in records)
    columns = NUMBERS if numbers else [c for c in TEXT if routed or c.key != "routed"]
    title = f"{OPERATION_WORDS.get(operation, operation)}: times"
    return Table(operation, title, NOTE, columns, records, legend=LEGEND)


def _record(rows: SpeedRows, place: Place, provider: str, mode: str) -> Record:
    metric = f"{mode}_ms"
    eager = rows.find(place, provider, metric, EAGER)
    graph = rows.find(place, provider, metric, GRAPH)
    shown = eager if eager is not None else graph
    labels = {} if shown is None else shown.labels
    best = number(graph) or number(eager)
    floor = label(eager, "floor_ms") or label(graph, "floor_ms")
    peak = rows.find(place, provider, f"{mode}_peak_bytes")
    score = rows.find(place, provider, "score_mean_absolute_error")
    flipped = rows.find(place, provider, "decisions_flipped")
    record: Record = {
        "operation": place.operation,
        "shape": place.shape,
        "fraction": place.routed,
        "routed": None if place.routed is None else share(place.routed),
        "kv_fraction": None if shown is None else shown.kv_fraction,
        "mode": MODE_WORDS[mode],
        "provider": provider,
        "n": None if shown is None or shown.value is None else shown.n,
        "times_faster": _times_faster(rows, place, provider, metric, EAGER),
        "graph_times_faster": _times_faster(rows, place, provider, metric, GRAPH),
        "floor_ms": floor,
        "floor_bound": labels.get("floor_bound"),
        "of_floor": floor / best if floor is not None and best else None,
        "memory": number(peak),
        "peak_bytes": number(peak),
        "max_relative_error": label(shown, "max_relative_error"),
        "worst_tensor": labels.get("worst_tensor"),
        "error": _error_words(shown),
        "correct": None if shown is None or shown.correct is None else str(shown.correct).lower(),
        "score": labels.get("score"),
        "score_mean_absolute_error": number(score),
        "decisions_flipped": number(flipped),
        "guard": labels.get("guard"),
        "note": _note(shown),
    }
    for name, row in (("eager", eager), ("graph", graph)):
        record |= {
            name: _time_words(row),
            f"{name}_ms": number(row),
            f"{name}_p20_ms": None if row is None else row.low,
            f"{name}_p80_ms": None if row is None else row.high,
            f"{name}_error": None if row is None else row.error,
        }
    return record


def _times_faster(
    rows: SpeedRows, place: Place, provider: str, metric: str, launch_mode: str
) -> float | None:
    """How many times faster our kernel is; nothing where either result is not known to be right."""
    ours = rows.find(place, OURS, metric, launch_mode)
    theirs = rows.find(place, provider, metric, launch_mode)
    if provider == OURS or ours is None or theirs is None:
        return None
    if not is_right(ours) or not is_right(theirs):
        return None
    return (theirs.value or 0.0) / (ours.value or 1.0)


def _time_words(row: Row | None) -> Entry:
    if row is None:
        return None
    if row.value is None:
        return f"failed: {reason(row.error or '')}"
    text = significant(row.value)
    if row.low is None or row.high is None:
        return text
    ends = ", ".join(significant(end, like=row.value) for end in (row.low, row.high))
    return f"{text} [{ends}]"


def _error_words(row: Row | None) -> Entry:
    error = label(row, "max_relative_error")
    if row is None or error is None:
        return None
    return f"{error:.1e} ({row.labels.get('worst_tensor')})"


def _note(row: Row | None) -> Entry:
    if row is None or row.value is None:
        return None
    parts = ["right" if row.correct else "WRONG" if row.correct is False else "not compared"]
    if "guard" in row.labels:
        parts.append("its own guard bypassed")
    if row.labels.get("score") not in (None, "none"):
        parts.append(f"with the {row.labels['score']} score")
    if "gradients" in row.labels:
        parts.append("gradients refused")
    if "includes" in row.labels:
        parts.append(str(row.labels["includes"]))
    return "; ".join(parts)
