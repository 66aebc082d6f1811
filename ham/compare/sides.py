"""The rows and manifests of one side of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ham.errors import ConfigError, MissingDataError, unknown_choice
from ham.files import read_jsonl
from ham.report.aggregate import Results
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import SCHEMA_VERSION, Row, read_rows

ROWS = "*.rows.jsonl"


@dataclass(frozen=True)
class Side:
    """One run.

    Attributes:
        path: The folder or file as it was named.
        rows: Its rows; a value that is not finite is a failure.
        manifests: The manifests beside its rows files, by id.
    """

    path: Path
    rows: list[Row]
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def used_manifests(self) -> list[dict[str, Any]]:
        """The manifests that rows refer to."""
        used = {row.manifest_id for row in self.rows}
        return [manifest for name, manifest in self.manifests.items() if name in used]

    @property
    def unexplained(self) -> int:
        """How many manifests rows refer to that are not there."""
        return len({row.manifest_id for row in self.rows} - self.manifests.keys())

    def only(self, metrics: Sequence[str], models: Sequence[str]) -> Side:
        """The rows of some metrics and models; an empty choice stands for all."""
        return self.with_rows(
            row
            for row in self.rows
            if (not metrics or row.metric in metrics) and (not models or row.model in models)
        )

    def with_rows(self, rows: Iterable[Row]) -> Side:
        """The same run with some of its rows."""
        return replace(self, rows=list(rows))


def load_sides(
    one: Path, other: Path, metrics: Sequence[str] = (), models: Sequence[str] = ()
) -> tuple[Side, Side]:
    """Read two runs.

    Args:
        one, other: A folder, whose rows files may lie at any depth, or a rows file.
        metrics, models: Compare only these.

    Raises:
        MissingDataError: If a path does not exist or holds no rows.
        ConfigError: If their schema versions differ, or neither has a chosen metric or model.
        CorruptFileError: If a line is not a row.
    """
    files = {path: rows_files(path) for path in (one, other)}
    _check_versions({path: schema_versions(found) for path, found in files.items()})
    sides = [_load(path, files[path]) for path in (one, other)]
    for kind, chosen in (("metric", metrics), ("model", models)):
        known = {getattr(row, kind) for side in sides for row in side.rows}
        for name in chosen:
            if name not in known:
                raise unknown_choice(kind, name, known)
    return sides[0].only(metrics, models), sides[1].only(metrics, models)


def rows_files(path: Path) -> list[Path]:
    """The rows files of a run.

    Raises:
        MissingDataError: If there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingDataError(f"{path} does not exist; name a folder of rows or a JSON-lines file")
    found = sorted(path.rglob(ROWS))
    if not found:
        raise MissingDataError(f"{path} holds no {ROWS}, neither itself nor in a folder below")
    return found


def schema_versions(files: Iterable[Path]) -> set[Any]:
    """The schema versions that rows give, before they are read as rows of this one."""
    return {record.get("schema_version") for path in files for record in read_jsonl(path)}


def _check_versions(found: Mapping[Path, set[Any]]) -> None:
    if all(versions <= {SCHEMA_VERSION} for versions in found.values()):
        return
    words = [f"{path} has version {_listed(versions)}" for path, versions in found.items()]
    raise ConfigError(
        f"rows of these schema versions cannot be compared: {' and '.join(words)}; this ham-bench "
        f"reads version {SCHEMA_VERSION}"
    )


def _listed(versions: set[Any]) -> str:
    return ", ".join(sorted(map(str, versions)))


def _load(path: Path, files: Sequence[Path]) -> Side:
    rows = Results(read_rows(files)).rows
    if not rows:
        raise MissingDataError(f"{path} holds no rows: the run is empty")
    beside = [manifest_path(file) for file in files]
    manifests = [read_manifest(file) for file in beside if file.is_file()]
    known = {str(manifest.get("manifest_id")): manifest for manifest in manifests}
    return Side(path, [*rows, *_rows_of_bytes(rows)], known)


def _rows_of_bytes(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of a sweep carry bytes as labels of their time; as rows they can be compared."""
    plain = {"low": None, "high": None, "interval": None}
    for row in rows:
        if row.value is not None:
            for name, value in row.labels.items():
                if name.endswith("_bytes"):
                    yield row.model_copy(update={"metric": name, "value": float(value), **plain})
