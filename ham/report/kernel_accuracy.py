"""Table of how close each provider of a speed run came to float64."""

from __future__ import annotations

from collections.abc import Mapping

from ham.report.formats import reason, share
from ham.report.kernel_cells import OPERATION_WORDS, Place, SpeedRows
from ham.report.rows import Row
from ham.report.tables_base import Column, Entry, Record, Table

NAME = "accuracy"
METRIC = "max_relative_error"
SCORE_METRICS = ("score_mean_absolute_error", "decisions_flipped")
NOTE = (
    "Every provider against float64 on the tensors that are timed, outputs and every gradient, "
    "worst tensor. In bfloat16 the error is the norm of the difference divided by the norm of the "
    "truth, in float32 the largest difference divided by the largest magnitude. A decision is "
    "flipped where a token's score, minimum over heads, crosses the threshold of a quarter routed."
)
LEGEND = "A dash: nothing of the kind. A provider that was compared may still lack times."


def accuracy_table(rows: SpeedRows) -> Table | None:
    """Errors by operation, shape and provider; None if nothing was compared."""
    records = [
        _record(rows, place, provider, compared)
        for place in rows.places
        for provider in rows.providers(place)
        if (compared := rows.find(place, provider, METRIC)) is not None
    ]
    if not records:
        return None
    columns = [
        Column("operation", "operation"),
        Column("shape", "shape"),
        Column("fraction", "routed", share),
        Column("provider", "provider"),
        Column("dtype", "dtype"),
        Column(METRIC, "largest error", _power),
        Column("worst_tensor", "of"),
        Column("tolerance", "accepted", _power),
        Column("score", "score"),
        Column("score_mean_absolute_error", "score: mean absolute error", _power),
        Column("decisions_flipped", "decisions flipped", _small_share),
        Column("verdict", "result"),
    ]
    return Table(NAME, "Accuracy", NOTE, columns, records, legend=LEGEND)


def _record(rows: SpeedRows, place: Place, provider: str, compared: Row) -> Record:
    labels = compared.labels
    record: Record = {
        "operation": OPERATION_WORDS.get(place.operation, place.operation),
        "shape": place.shape,
        "fraction": place.routed,
        "provider": provider,
        "dtype": labels.get("dtype"),
        METRIC: compared.value,
        "worst_tensor": _worst_tensor(labels),
        "tolerance": labels.get("tolerance"),
        "score": labels.get("score"),
        "verdict": _verdict(compared),
    }
    for metric in SCORE_METRICS:
        row = rows.find(place, provider, metric)
        record[metric] = None if row is None else row.value
    return record


def _worst_tensor(labels: Mapping[str, str | int | float]) -> Entry:
    prefix = "error "
    errors = {
        key.removeprefix(prefix): value
        for key, value in labels.items()
        if key.startswith(prefix) and isinstance(value, int | float)
    }
    return max(errors, key=lambda name: errors[name]) if errors else None


def _verdict(row: Row) -> str:
    if row.value is None:
        return f"failed: {reason(row.error or '')}"
    return "right" if row.correct else "WRONG"


def _power(value: float, like: float | None = None) -> str:
    return f"{value:.1e}"


def _small_share(value: float, like: float | None = None) -> str:
    return f"{value * 100:.2f} %"
