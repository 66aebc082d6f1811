"""Rows of a long measurement on disk: finished cells are found again by a later run.

A cell is what is measured at once; its key says what that is, and one cell may have several rows. A
cell that failed is a row with its error. The file is written whole, atomically, after every cell,
so killing a run loses one cell. The manifest beside it lists every command that added rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ham.errors import ConfigError
from ham.report.manifest import manifest_path, portable_command, read_manifest, write_manifest
from ham.report.rows import Row, RowWriter, read_rows, write_rows

# Model and mixer of rows about the device itself: its measured rates.
DEVICE = "device"


class RowStore:
    """The rows of one file; subclasses say what identifies a cell.

    Args:
        path: JSON-lines file, or None to keep rows in memory only.
        common: Fields that all new rows share: `device`, `code_fingerprint`, `manifest_id`.
        overwrite: Forget what the file holds.
        retry_errors: Treat failed cells as not run.

    Raises:
        ConfigError: If the file's rows come from other code or another device.
    """

    def __init__(
        self,
        path: Path | None,
        common: Mapping[str, str],
        overwrite: bool = False,
        retry_errors: bool = False,
    ):
        self.path = path
        self.writer = RowWriter(**common)
        self.retry_errors = retry_errors
        self.cells: dict[Hashable, list[Row]] = {}
        self.manifest: dict[str, Any] = {}
        self.resumed = False
        if path is not None and path.exists() and not overwrite:
            self._resume(read_rows(path), common)

    @classmethod
    def of_run(
        cls,
        path: Path | None,
        manifest: Mapping[str, Any],
        code: str,
        command: Sequence[str],
        *,
        overwrite: bool = False,
        retry_errors: bool = False,
    ) -> Self:
        """The store of a run that begins or goes on, with its manifest written beside the rows.

        A run that goes on keeps the manifest of its first part and adds its command.

        Args:
            path: JSON-lines file, or None.
            manifest: What `collect_manifest` says of this process.
            code: Fingerprint of the code that measures.
            command: The command line.
            overwrite: Forget what the file holds.
            retry_errors: Treat failed cells as not run.
        """
        common = {
            "device": manifest["device"],
            "code_fingerprint": code,
            "manifest_id": manifest["manifest_id"],
        }
        store = cls(path, common, overwrite, retry_errors)
        empty: dict[str, Any] = {"commands": [], "ceilings": {}, "tiles": {}}
        store.manifest = {**manifest, "measured": empty}
        if path is not None and store.resumed:
            store.manifest = read_manifest(manifest_path(path))
        measured = store.manifest.setdefault("measured", {})
        measured.setdefault("commands", []).append(portable_command(command))
        if path is not None:
            write_manifest(manifest_path(path), store.manifest)
        return store

    def finish(self, seconds: float, tiles: Mapping[str, Sequence[str]] | None = None) -> None:
        """Write the manifest with what was measured; wall times of several runs add up.

        Args:
            seconds: Wall time of this part of the run.
            tiles: Tiles that kernel launchers chose, by operation and shape.
        """
        measured = self.manifest.setdefault("measured", {})
        measured["ceilings"] = self.rates()
        measured["tiles"] = {**measured.get("tiles", {}), **(tiles or {})}
        if self.path is not None:
            total = (self.manifest.get("wall_seconds") or 0.0) + seconds
            write_manifest(manifest_path(self.path), self.manifest, total)

    def key_of(self, row: Row) -> Hashable:
        """The cell that a row belongs to."""
        raise NotImplementedError

    def has(self, key: Hashable) -> bool:
        """Whether a cell is finished."""
        rows = self.cells.get(key, [])
        failed = any(row.error is not None for row in rows)
        return bool(rows) and not (self.retry_errors and failed)

    def rates(self) -> dict[str, float]:
        """The measured rates of the device by metric."""
        return {
            row.metric: row.value
            for row in self.all_rows()
            if row.model == DEVICE and row.value is not None
        }

    def make(self, experiment: str, metric: str, value: float | None, **fields: object) -> Row:
        """A new row of this job, not stored yet."""
        return self.writer.add(experiment, metric, value, **fields)

    def put(self, rows: Iterable[Row]) -> None:
        """Store whole cells in place of earlier ones with their keys, and write the file."""
        self.cells.update(self._by_key(rows))
        if self.path is not None:
            write_rows(self.path, self.all_rows())

    def all_rows(self) -> list[Row]:
        """Every row, in the order in which cells were first measured."""
        return [row for rows in self.cells.values() for row in rows]

    def _resume(self, rows: list[Row], common: Mapping[str, str]) -> None:
        for row in rows:
            for field in ("code_fingerprint", "device"):
                if getattr(row, field) != common[field]:
                    raise ConfigError(
                        f"{self.path} holds rows with {field} {getattr(row, field)!r}, now "
                        f"{common[field]!r}; use --overwrite or another --rows file"
                    )
        self.cells = self._by_key(rows)
        self.resumed = bool(rows)
        if rows:
            self.writer.common["manifest_id"] = rows[0].manifest_id

    def _by_key(self, rows: Iterable[Row]) -> dict[Hashable, list[Row]]:
        cells: dict[Hashable, list[Row]] = {}
        for row in rows:
            cells.setdefault(self.key_of(row), []).append(row)
        return cells
