"""Rows of a speed run on disk: one number per key, finished ones found again by a later run."""

from __future__ import annotations

from ham.report.row_store import RowStore
from ham.report.rows import Row

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


class SpeedStore(RowStore):
    """The rows of a speed run."""

    def key_of(self, row: Row) -> Key:
        """Operation, shape, routed share, provider, metric, launch mode and dtype."""
        return key_of(row)
