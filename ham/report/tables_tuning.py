"""The sweep of learning rates: what every arm was tried at and what was chosen."""

from __future__ import annotations

from ham.report import formats
from ham.report.aggregate import Results, summarise
from ham.report.tables_base import MODEL, Column, Record, Table, models_of
from ham.train.tuning import EXPERIMENT, best_rate, edge_of, last_losses

NOTE = (
    "Last loss in nats on held-out {rows} by learning rate, on one seed that is not reported; "
    "every arm has the same rates and steps, and the lowest loss decides. At an end of the rates "
    "tried the best one may lie outside."
)
ROWS = {
    "validation": "text",
    "mixture": "text and recall documents, by their shares of the training rows,",
}


def tuning(results: Results) -> Table:
    """One line a model; a rate whose run failed says why."""
    tried = {model: last_losses(results.rows, model) for model in models_of(results, EXPERIMENT)}
    rates = sorted({rate for losses in tried.values() for rate in losses})
    columns = [MODEL]
    columns += [Column(f"loss_at_{rate:g}", f"{rate:g}", formats.bits) for rate in rates]
    columns += [
        Column("chosen", "chosen", formats.plain),
        Column("edge", "at an end of the rates tried"),
        Column("steps", "steps", formats.count),
        Column("seed", "seed", formats.count),
    ]
    records: list[Record] = []
    for model, losses in tried.items():
        record: Record = {"model": model}
        record |= {f"loss_at_{rate:g}": summarise([row]) for rate, row in losses.items()}
        values = {rate: row.value for rate, row in losses.items()}
        best = best_rate(values)
        row = next(iter(losses.values()))
        record |= {"chosen": best, "steps": row.x_value, "seed": row.seed}
        record["edge"] = edge_of(best, values) or "no"
        records.append(record)
    tasks = {row.task for losses in tried.values() for row in losses.values() if row.task in ROWS}
    note = NOTE.format(rows=ROWS["mixture" if "mixture" in tasks else "validation"])
    return Table("tuning", "Learning rates", note, columns, records)
