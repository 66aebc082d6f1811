"""Tables of a sweep: one for each experiment, the parts of a step."""

from __future__ import annotations

from collections.abc import Sequence

from ham.measure.sweep.grid import DECODE_PART, EXPERIMENTS, MODEL_PREFILL
from ham.report.formats import byte_size, count, reason, share, significant
from ham.report.rows import Row
from ham.report.sweep_cells import EXPERIMENT_WORDS, Place, Series, SweepRows, number, order_parts
from ham.report.tables_base import Column, Record, Table

NOTES = {
    "mixer_decode": (
        "One token per sequence, between the projections and the output projection: for HAM "
        "convolution, state update, score, append, attention, gates; for attention rotation, "
        "append, attention."
    ),
    "model_decode": "Logits and the greedy next token of every sequence, the whole model.",
    MODEL_PREFILL: (
        "A whole context into an empty memory, up to the first token; {launch}. "
        "Larger cells than 262,144 tokens are not part of the grid."
    ),
    "model_train": (
        "Forward, backward and AdamW on random tokens; the batch is 32,768 tokens over the "
        "context (on a CPU: fewer)."
    ),
}
EAGER_PREFILL = "launched eagerly for all"
GRAPH_PREFILL = (
    "one CUDA graph, and behind it the allocation of pages for routed tokens and the launch that "
    "fills them, which are in the time"
)
COMMON_NOTE = (
    "Routing is forced by a hash, so the realised share is that of the hash. Memory is what was "
    "allocated; the peak includes weights. Percent of copy bandwidth: caches, states and weights "
    "that a step must move, over its time and the measured copy rate (a read-only kernel can "
    "exceed 100)."
)
LEGEND = (
    "Brackets: 20th and 80th percentile of n calls. A dash: does not apply or no number. A cell "
    "that is not listed was not run."
)
COLUMNS = [
    Column("series", "model"),
    Column("context", "context", count),
    Column("batch", "batch", count),
    Column("head_dim", "head size", count),
    Column("kv_fraction", "realised share", share),
    Column("time", "ms"),
    Column("tokens_per_s", "tokens/s", significant),
    Column("percent_of_copy_bandwidth", "% of copy bandwidth", significant),
    Column("kv_bytes", "KV cache", byte_size),
    Column("state_bytes", "states", byte_size),
    Column("peak_bytes", "peak memory", byte_size),
    Column("slot_waste", "empty slots", share),
    Column("ragged_waste", "padding if padded", share),
    Column("launch", "launch"),
    Column("provider", "provider"),
    Column("n", "n"),
    Column("note", "note"),
]
LABELS = (
    "tokens_per_s",
    "percent_of_copy_bandwidth",
    "bytes_read_per_token",
    "bytes_moved",
    "kv_bytes",
    "state_bytes",
    "full_cache_bytes",
    "peak_bytes",
    "slot_waste",
    "ragged_waste",
)
NUMBERS = [
    Column(key, key)
    for key in (
        "experiment",
        "model",
        "fraction",
        "routing",
        "kv_fraction",
        "context",
        "batch",
        "head_dim",
        "launch_mode",
        "provider",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "n",
        *LABELS,
        "error",
    )
]


def sweep_tables(rows: SweepRows, numbers: bool = False) -> list[Table]:
    """A table for each experiment with rows; `numbers` gives the columns for programs."""
    tables = []
    for experiment in EXPERIMENTS:
        cells = rows.cells(experiment)
        if not cells:
            continue
        if experiment == DECODE_PART:
            tables.append(_parts_table(rows))
            continue
        records = [_record(place, series, row) for place, series, row in cells]
        used = {key for record in records for key, value in record.items() if value is not None}
        columns = NUMBERS if numbers else [column for column in COLUMNS if column.key in used]
        note = f"{_experiment_note(experiment, [row for _, _, row in cells])} {COMMON_NOTE}"
        title = EXPERIMENT_WORDS[experiment]
        tables.append(Table(experiment, title, note, columns, records, legend=LEGEND))
    return tables


def _experiment_note(experiment: str, rows: Sequence[Row]) -> str:
    """What was timed; prefill has not always been a graph."""
    modes = {row.launch_mode for row in rows if row.value is not None}
    launch = EAGER_PREFILL if modes <= {"eager"} else GRAPH_PREFILL
    return NOTES[experiment].format(launch=launch)


def _record(place: Place, series: Series, row: Row) -> Record:
    clustered = ", clustered" if "clustered" in place.routing and series.fraction >= 0 else ""
    labels = {name: number(row, name) for name in LABELS}
    return {
        "series": f"{series.name}{clustered}",
        "experiment": place.experiment,
        "model": series.model,
        "fraction": None if series.fraction < 0 else series.fraction,
        "routing": None if series.fraction < 0 else place.routing,
        "kv_fraction": row.kv_fraction,
        "context": place.context,
        "batch": place.batch,
        "head_dim": place.head_dim,
        "launch": None if row.value is None else row.launch_mode.replace("_", " "),
        "launch_mode": row.launch_mode,
        "provider": None if row.value is None else row.provider,
        "time": time_words(row),
        "median_ms": row.value,
        "p20_ms": row.low,
        "p80_ms": row.high,
        "n": None if row.value is None else row.n,
        **labels,
        "note": row.labels.get("note"),
        "error": row.error,
    }


def time_words(row: Row) -> str:
    """Median with spread, or why there is none."""
    if row.value is None:
        return f"failed: {reason(row.error or '', 90)}"
    text = significant(row.value)
    if row.low is None or row.high is None:
        return text
    ends = ", ".join(significant(end, like=row.value) for end in (row.low, row.high))
    return f"{text} [{ends}]"


def _parts_table(rows: SweepRows) -> Table:
    """Parts by step: their times alone, their sum, and the whole step."""
    names: set[str] = set()
    words: dict[str, None] = {}
    records: list[Record] = []
    for place, series, row in rows.cells(DECODE_PART):
        parts = rows.parts(place, series)
        names.update(parts)
        words.update(_part_words(series, parts))
        total = sum(part.value or 0.0 for part in parts.values())
        records.append(
            {
                "series": series.name,
                "context": place.context,
                "batch": place.batch,
                **{name: part.value for name, part in parts.items()},
                "sum": total if parts else None,
                "time": time_words(row),
                "n": None if row.value is None else row.n,
            }
        )
    columns = [
        *COLUMNS[:3],
        *(Column(name, f"{name}, ms", significant) for name in order_parts(names)),
        Column("sum", "sum, ms", significant),
        Column("time", "whole step, ms"),
        Column("n", "n"),
    ]
    note = (
        "Each part runs alone for all layers in turn, launched as the whole step is; the sum "
        "differs from the whole step where parts overlap or share what they read."
    )
    note = " ".join([note, *words])
    title = EXPERIMENT_WORDS[DECODE_PART]
    return Table(DECODE_PART, title, note, columns, records, legend=LEGEND)


def _part_words(series: Series, parts: dict[str, Row]) -> dict[str, None]:
    """Sentences about parts that are more than their name or launched unlike the step, in order."""
    words = []
    for name, part in parts.items():
        labels = part.labels
        if "fused" in labels:
            words.append(f"{series.model}, {name}: {labels['fused']}.")
        if "note" in labels or part.error is not None:
            how = f"{labels['operations']}, {part.launch_mode}"
            why = reason(part.error or str(labels["note"]), 160)
            words.append(f"{series.model}, {name}: {how}; {why}.")
    return dict.fromkeys(words)
