"""Invented rows and claims; no number here was measured."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ham.claims.config import Claims, parse_claims
from ham.claims.evidence import Observation
from ham.report.rows import Row


def make_row(model: str, value: float | None, seed: int | None = 0, **fields: Any) -> Row:
    values = {
        "experiment": "language_modelling",
        "metric": "bits_per_byte",
        "task": "text",
        "x_name": "context",
        "x_value": 512.0,
        "error": "out of memory" if value is None else None,
    }
    common = {"model": model, "mixer": "ham", "device": "invented", "value": value, "seed": seed}
    return Row(**{**common, **values, **fields})


def observed(rows: Sequence[Row], run: str = "run", **fields: Any) -> list[Observation]:
    return [Observation(row, run, **fields) for row in rows]


def seeds_of(model: str, values: Sequence[float], **fields: Any) -> list[Row]:
    return [make_row(model, value, seed, **fields) for seed, value in enumerate(values)]


STATED = datetime(2026, 1, 1, tzinfo=UTC)
TEXT = {"experiment": "language_modelling", "metric": "bits_per_byte"}


def make_test(**changes: Any) -> dict[str, Any]:
    test = {
        "name": "t",
        "test": "superiority",
        "delta": {"value": 0.02, "unit": "bits per byte", "reason": "invented"},
        "where": TEXT,
        "arm": {"model": "ours"},
        "reference": [{"model": "theirs"}],
    }
    return {key: value for key, value in {**test, **changes}.items() if value is not None}


def make_claims(*tests: dict[str, Any], families: Sequence[str] = ("main",)) -> Claims:
    claims = [
        {
            "id": f"X{index}",
            "statement": "ours is better",
            "source": "invented",
            "expectation": "none",
            "stated": STATED,
            "tests": [test],
        }
        for index, test in enumerate(tests)
    ]
    values = {"families": {name: {"about": "invented"} for name in families}, "claims": claims}
    return parse_claims(values, "claims.yaml")


def timing_rows(
    factor: float, batch: int = 1, spread: float = 0.01, seed: None = None, **fields: Any
) -> list[Row]:
    """Rows of one cell: ours, and a rival that takes `factor` times as long."""
    common = {
        "experiment": "model_decode",
        "metric": "median_ms",
        "task": None,
        "launch_mode": "cuda_graph",
        "interval": "p20_p80",
        "x_value": 4096.0,
    }
    rows = []
    for model, value in (("ours", 2.0), ("theirs", 2.0 * factor)):
        ends = {"low": value * (1 - spread), "high": value * (1 + spread)}
        labels = {"batch": batch, "kv_bytes": 1000 if model == "ours" else 4000}
        rows.append(make_row(model, value, seed, **{**common, **ends, "labels": labels, **fields}))
    return rows
