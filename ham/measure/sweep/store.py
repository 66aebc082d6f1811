"""Rows of a sweep on disk; what is there already is not measured again.

One row is one cell: its value is the median time in `median_ms`, everything else that was found out
stands in `labels` (`batch`, `tokens_per_s`, `peak_bytes`, `kv_bytes`, ...). A cell that failed is a
row with its error. The file is written whole after every cell, so killing a run loses one cell.
"""

from __future__ import annotations

from pathlib import Path

from ham.errors import ConfigError
from ham.measure.sweep.grid import Cell
from ham.measure.sweep.models import arm_name
from ham.report.rows import Row, RowWriter, read_rows, write_rows

CEILING_EXPERIMENT = "sweep_ceiling"
CEILING_MODEL = "device"
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


def row_key(row: Row) -> Key:
    """The cell that a row belongs to; ceilings have one of their own."""
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


class SweepStore:
    """The rows of one file.

    Args:
        path: JSON-lines file, or None to keep rows in memory only.
        common: Fields that all new rows share.
        overwrite: Forget what the file holds.
        retry_errors: Treat failed cells as not run.

    Raises:
        ConfigError: If the file's rows come from other code or another device.
    """

    def __init__(
        self,
        path: Path | None,
        common: dict[str, str],
        overwrite: bool = False,
        retry_errors: bool = False,
    ):
        self.path = path
        self.writer = RowWriter(**common)
        self.retry_errors = retry_errors
        self.rows: dict[Key, list[Row]] = {}
        self.resumed_manifest: str | None = None
        if path is not None and path.exists() and not overwrite:
            self._resume(read_rows(path), common)

    def _resume(self, rows: list[Row], common: dict[str, str]) -> None:
        for row in rows:
            for field in ("code_fingerprint", "device"):
                if getattr(row, field) != common[field]:
                    raise ConfigError(
                        f"{self.path} holds rows with {field} {getattr(row, field)!r}, now "
                        f"{common[field]!r}; use --overwrite or another --rows file"
                    )
            self.rows.setdefault(row_key(row), []).append(row)
        if rows:
            self.resumed_manifest = rows[0].manifest_id
            self.writer.common["manifest_id"] = rows[0].manifest_id

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        rows = self.rows.get(cell_key(cell), [])
        failed = any(row.error is not None for row in rows)
        return bool(rows) and not (self.retry_errors and failed)

    def rates(self) -> dict[str, float]:
        """The measured ceilings by metric."""
        return {
            row.metric: row.value
            for rows in self.rows.values()
            for row in rows
            if row.experiment == CEILING_EXPERIMENT and row.value is not None
        }

    def make(self, experiment: str, metric: str, value: float | None, **fields: object) -> Row:
        """A new row of this job, not stored yet."""
        return self.writer.add(experiment, metric, value, **fields)

    def put(self, rows: list[Row]) -> None:
        """Store the rows of one cell in place of earlier ones, and write the file."""
        self.rows[row_key(rows[0])] = rows
        if self.path is not None:
            write_rows(self.path, self.all_rows())

    def all_rows(self) -> list[Row]:
        """Every row, in the order in which cells were first measured."""
        return [row for rows in self.rows.values() for row in rows]
