"""Result rows: one number per row, long format, JSON lines, one file per job.

A row carries everything that a reader needs to judge its number: the realised KV fraction, the
provider, the launch mode, the device, n and an interval. A cell that failed is a row with `error`
set and `value` empty; it is never left out. Metric names end in their unit (`decode_ms`,
`kv_bytes`, `bits_per_byte`), shares and accuracies are in 0..1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ham.config import Strict
from ham.config_files import describe_faults
from ham.errors import CorruptFileError
from ham.files import read_jsonl, write_jsonl

SCHEMA_VERSION = 1

ROUTING_SEED = "routing_seed"
"""Metric of a training run: the seed of its routing hashes. Runs without it took 0 by default."""


class Row(Strict):
    """One measured number.

    Attributes:
        experiment: Which stage made it: `train`, `language_modelling`, `gates`, `lm_eval`,
            `needle`, `recall`, `dial`, `throughput`, `memory`, `inspect`, `agreement`,
            `kernel_speed`, `kernel_training`, `mqar`, `mqar_tuning`, and those of
            `ham.measure.sweep.grid`.
        model: Name of the arm; `mixer` its registered class.
        parameters: Parameters of the model, embedding included.
        x_name, x_value: The coordinate that a plot puts on its horizontal axis.
        labels: Further coordinates, e.g. `{"depth": 0.5}` or `{"layer": 1}`.
        kv_fraction: Share of tokens that were really routed to the KV cache in this measurement;
            1 for full attention, None where there is no KV cache or no such notion.
        launch_mode: `eager`, `compiled` or `cuda_graph`.
        n: Observations behind `value` (documents, needles, repetitions).
        effective_n: How many independent observations the n are worth where several come from one
            sample (answers of one needle question); the interval is that of this many. None where
            they are independent.
        low, high: Ends of the interval named by `interval` (`wilson95`, `bootstrap95`,
            `t95`, `p20_p80`).
        correct: Whether what was timed gave the right result; None where that was not compared or
            is not the question.
        manifest_id: The manifest of the job that made the row.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    experiment: str
    model: str
    mixer: str
    parameters: int | None = None
    seed: int | None = None
    metric: str
    value: float | None = None
    task: str | None = None
    x_name: str | None = None
    x_value: float | None = None
    labels: dict[str, str | int | float] = Field(default_factory=dict)
    kv_fraction: float | None = None
    provider: str = "torch"
    launch_mode: Literal["eager", "compiled", "cuda_graph"] = "eager"
    device: str
    n: int = 1
    effective_n: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    correct: bool | None = None
    config_hash: str = ""
    code_fingerprint: str = ""
    manifest_id: str = ""
    error: str | None = None

    @model_validator(mode="after")
    def _value_or_error(self) -> Row:
        if (self.value is None) == (self.error is None):
            raise ValueError("a row has either a value or an error")
        if (self.x_name is None) != (self.x_value is None):
            raise ValueError("x_name and x_value go together")
        if (self.low is None) != (self.high is None) or (self.low is None) != (
            self.interval is None
        ):
            raise ValueError("low, high and interval go together")
        return self


class RowWriter:
    """Collects the rows of one job; the fields common to all of them are given once.

    Args:
        common: Fields of `Row` that every row of this job shares.
    """

    def __init__(self, **common: Any):
        self.common = common
        self.rows: list[Row] = []

    def add(self, experiment: str, metric: str, value: float | None, **fields: Any) -> Row:
        """Append a row; numbers are converted to plain floats."""
        if value is not None:
            value = float(value)
        if fields.get("x_value") is not None:
            fields["x_value"] = float(fields["x_value"])
        row = Row(
            **{**self.common, "experiment": experiment, "metric": metric, "value": value, **fields}
        )
        self.rows.append(row)
        return row

    def write(self, path: str | os.PathLike) -> None:
        """Write all rows atomically."""
        write_rows(path, self.rows)


def write_rows(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, atomically."""
    write_jsonl(path, (row.model_dump() for row in rows))


def read_rows(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Row]:
    """Read rows of one or several files.

    Raises:
        MissingDataError: If a file does not exist.
        CorruptFileError: If a line is not a row of this schema version; names file and line.
    """
    files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    rows = []
    for path in files:
        for number, record in enumerate(read_jsonl(path), start=1):
            _check_version(record, Path(path), number)
            try:
                rows.append(Row.model_validate(record))
            except ValidationError as error:
                faults = describe_faults(error, Row)
                raise CorruptFileError(
                    f"{Path(path)} record {number} is not a result row:\n{faults}"
                ) from error
    return rows


def _check_version(record: object, path: Path, number: int) -> None:
    version = record.get("schema_version", SCHEMA_VERSION) if isinstance(record, dict) else None
    if version not in (None, SCHEMA_VERSION):
        raise CorruptFileError(
            f"{path} record {number} is not a result row: it has schema version {version!r}, this "
            f"ham-bench reads version {SCHEMA_VERSION}; use the commit that its manifest names"
        )
