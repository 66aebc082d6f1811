"""The rows that claims are judged by: which run made each, and whether that was a smoke run.

A run is a folder with a `config.yaml` or with the checksums of published results, or the folder
given where there is none of these below it. Its rows lie anywhere below it in `*.rows.jsonl`; the
manifests beside them say which configuration made them and at what scale. Comparisons never mix
rows of different runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ham.errors import MissingDataError
from ham.report.aggregate import Results
from ham.report.manifest import manifest_path, read_manifest
from ham.report.rows import Row, read_rows

CONFIG_FILE = "config.yaml"
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Observation:
    """A row with what its manifest says.

    Attributes:
        run: The folder it comes from.
        config: Name of the configuration, or None where no manifest tells.
        smoke: Whether that configuration was a smoke run.
        started: When the job began.
    """

    row: Row
    run: str
    config: str | None = None
    smoke: bool = False
    started: datetime | None = None


@dataclass(frozen=True)
class Evidence:
    """Rows that lie beside those of a run: of studies, of speed measurements.

    Attributes:
        observations: The rows.
        manifests: Of the jobs behind them.
        places: Where they are from, as commands name it.
    """

    observations: tuple[Observation, ...] = ()
    manifests: tuple[Mapping[str, Any], ...] = ()
    places: tuple[str, ...] = ()


def observe(
    rows: Iterable[Row],
    manifests: Iterable[Mapping[str, Any]],
    run: str,
    config: Mapping[str, Any] | None = None,
) -> list[Observation]:
    """The rows of one run; a value that is not finite counts as a failed cell.

    Args:
        rows: Its rows.
        manifests: The manifests of its jobs, as far as they are there.
        run: What the run is called.
        config: The configuration of rows without a manifest.
    """
    known = {str(one.get("manifest_id")): one for one in manifests}
    absent = {"config": config or {}}
    found = []
    for row in Results(rows).rows:
        manifest = known.get(row.manifest_id, absent)
        settings = manifest.get("config") or {}
        started = manifest.get("started")
        found.append(
            Observation(
                row,
                run,
                settings.get("name"),
                settings.get("scale") == "smoke",
                None if started is None else datetime.fromisoformat(started),
            )
        )
    return found


def read_evidence(places: Sequence[str | os.PathLike]) -> list[Observation]:
    """The rows below folders; a rows file alone is a run too.

    Raises:
        MissingDataError: If a place does not exist or holds no rows.
        CorruptFileError: If rows are damaged or of another schema version.
    """
    return list(gather_evidence(places).observations)


def gather_evidence(places: Sequence[str | os.PathLike]) -> Evidence:
    """The rows below folders with their manifests.

    Raises:
        MissingDataError: If a place does not exist or holds no rows.
        CorruptFileError: If rows are damaged or of another schema version.
    """
    found: list[Observation] = []
    known: list[Mapping[str, Any]] = []
    for place in map(Path, places):
        if not place.exists():
            raise MissingDataError(f"{place} does not exist; give a folder with *.rows.jsonl files")
        files = [place] if place.is_file() else sorted(place.rglob("*.rows.jsonl"))
        if not files:
            raise MissingDataError(f"{place} holds no *.rows.jsonl file")
        for run, own in _by_run(place, files).items():
            beside = [path for path in map(manifest_path, own) if path.is_file()]
            manifests = [read_manifest(path) for path in beside]
            found += observe(read_rows(own), manifests, run.as_posix())
            known += manifests
    return Evidence(tuple(found), tuple(known), tuple(Path(place).as_posix() for place in places))


def _by_run(place: Path, files: list[Path]) -> dict[Path, list[Path]]:
    """Files by the nearest folder of a run; among such runs, others by their folder."""
    marks = () if place.is_file() else (CONFIG_FILE, CHECKSUMS)
    runs = {path.parent for mark in marks for path in place.rglob(mark)}
    if not runs:
        return {place: files}
    grouped: dict[Path, list[Path]] = {}
    for file in files:
        run = next((folder for folder in file.parents if folder in runs), file.parent)
        grouped.setdefault(run, []).append(file)
    return grouped
