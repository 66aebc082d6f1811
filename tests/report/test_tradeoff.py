"""Quality against memory: who is on the frontier, and who stands beside whom."""

from __future__ import annotations

import pytest

from ham.report.aggregate import Cell, Results, summarise
from ham.report.plots_base import Look
from ham.report.plots_tradeoff import frontier, memory_cell, memory_context
from ham.report.rows import Row
from ham.report.tables_tradeoff import byte_groups, equal_bytes


def row(model: str, experiment: str, metric: str, value: float, **more) -> Row:
    where = {"model": model, "mixer": "ham", "seed": 0, "device": "invented", **more}
    return Row(experiment=experiment, metric=metric, value=value, **where)


def memory_row(model: str, value: float, context: float = 2048.0) -> Row:
    where = {"task": "decode", "x_name": "context", "x_value": context}
    return row(model, "memory", "cache_bytes_allocated", value, **where)


def cell(value: float) -> Cell:
    return summarise([row("any", "recall", "accuracy", value)])


@pytest.mark.parametrize(
    ("lower", "expected"), [(True, ["small", "good"]), (False, ["small", "bad", "large"])]
)
def test_the_frontier_leaves_out_what_another_beats(lower: bool, expected: list[str]):
    memory = dict(
        zip(("small", "good", "bad", "large"), map(cell, (1.0, 2.0, 2.0, 3.0)), strict=True)
    )
    values = dict(
        zip(("small", "good", "bad", "large"), map(cell, (0.5, 0.3, 0.7, 0.9)), strict=True)
    )
    assert frontier(memory, values, lower) == expected


def test_of_equals_the_one_with_less_memory_is_on_the_frontier():
    memory = {"a": cell(2.0), "b": cell(1.0)}
    assert frontier(memory, {"a": cell(0.5), "b": cell(0.5)}, True) == ["b"]


def test_models_of_equal_memory_stand_together():
    sizes = {"a": 100.0, "b": 114.0, "c": 116.0, "d": 300.0}
    results = Results([memory_row(model, size) for model, size in sizes.items()])
    look = Look.of(results)
    # c is within 15 % of b, but not of the smallest; d is alone.
    assert byte_groups(results, look) == [["a", "b"]]
    table = equal_bytes(results, look)
    assert [(record["group"], record["model"]) for record in table.records] == [(1, "a"), (1, "b")]
    assert equal_bytes(Results([memory_row("a", 1.0)]), look).records == []


def test_memory_that_was_not_measured_is_that_of_the_dial_at_the_same_context():
    where = {"x_name": "target_fraction", "x_value": 0.5, "labels": {"context": 2048}}
    dial = row("ham-half", "dial", "cache_bytes_allocated", 70.0, **where)
    results = Results([memory_row("a", 100.0, 512.0), memory_row("a", 200.0), dial])
    look = Look.of(results, targets={"ham-half": 0.5})
    assert memory_context(results) == 2048
    assert memory_cell(results, look, "ham-half").value == 70.0
    assert memory_cell(results, Look.of(results), "ham-half").value is None
    longer = Results([memory_row("a", 100.0, 4096.0), dial])
    assert memory_cell(longer, look, "ham-half").value is None
