"""Rows of a sweep on disk; what is there already is not measured again.

The rows of one cell: its median time in `median_ms`, with everything else that was found out in
`labels` (`batch`, `tokens_per_s`, `peak_bytes`, `kv_bytes`, ...), and a `part_ms` for each part
that was timed alone.
"""

from __future__ import annotations

from ham.measure.sweep.grid import Cell
from ham.measure.sweep.models import arm_name
from ham.report.row_store import RowStore
from ham.report.rows import Row

CEILING_EXPERIMENT = "sweep_ceiling"
TIME = "median_ms"
PART_TIME = "part_ms"

Key = tuple


def cell_key(cell: Cell) -> Key:
    """What identifies a cell's rows."""
    return (
        cell.experiment,
        arm_name(cell.model),
        float(cell.context),
        cell.batch,
        cell.fraction,
        cell.head_dim,
        cell.routing if cell.fraction is not None else "",
    )


class SweepStore(RowStore):
    """The rows of a sweep."""

    def key_of(self, row: Row) -> Key:
        """The key of the row's cell, as `cell_key` writes it; ceilings have one of their own."""
        if row.experiment == CEILING_EXPERIMENT:
            return (row.experiment, row.metric)
        labels = row.labels
        return (
            row.experiment,
            row.model,
            row.x_value,
            labels.get("batch"),
            labels.get("fraction"),
            labels.get("head_dim"),
            labels.get("routing", ""),
        )
