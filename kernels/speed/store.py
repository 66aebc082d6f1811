"""Rows of a speed run on disk: one number per key, finished ones found again by a later run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ham.errors import ConfigError
from ham.report.rows import Row, RowWriter, read_rows, write_rows

EXPERIMENT = "kernel_speed"
Key = tuple[str, str | None, float | None, str, str, str, str]


def key_of(row: Row) -> Key:
    """What a row measures; two rows with one key are two tries at the same number."""
    fraction = row.labels.get("fraction")
    return (
        row.model,
        row.task,
        None if fraction is None else float(fraction),
        row.provider,
        row.metric,
        row.launch_mode,
        str(row.labels.get("dtype", "")),
    )


class RowStore:
    """The rows of one file; every change is written at once.

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
        self.rows: dict[Key, Row] = {}
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
            self.rows[key_of(row)] = row
        if rows:
            self.resumed_manifest = rows[0].manifest_id
            self.writer.common["manifest_id"] = rows[0].manifest_id

    def has(self, key: Key) -> bool:
        """Whether a cell is finished."""
        row = self.rows.get(key)
        return row is not None and not (self.retry_errors and row.error is not None)

    def find(self, model: str, metric: str) -> Row | None:
        """The first row of a model and metric with a value."""
        return next(
            (
                row
                for row in self.rows.values()
                if (row.model, row.metric) == (model, metric) and row.value is not None
            ),
            None,
        )

    def make(self, metric: str, value: float | None, **fields: object) -> Row:
        """A new row of this job, not stored yet."""
        return self.writer.add(EXPERIMENT, metric, value, **fields)

    def add(self, rows: Iterable[Row]) -> None:
        """Store rows in place of earlier ones with their keys, and write the file."""
        for row in rows:
            self.rows[key_of(row)] = row
        if self.path is not None:
            write_rows(self.path, self.rows.values())
