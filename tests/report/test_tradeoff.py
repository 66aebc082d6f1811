"""Quality against memory: who is on the frontier, and who stands beside whom."""

from __future__ import annotations

import pytest

from ham.report.aggregate import Cell, Results, summarise
from ham.report.palette import MUTED
from ham.report.plots_base import Look, style_context
from ham.report.plots_tradeoff import frontier, joined, memory_cell, memory_context, pareto
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


def seeded(make_rows, **seeds: int):
    """Rows of models with so many seeds each."""
    names = {name.replace("_", "-"): count for name, count in seeds.items()}
    return [
        one
        for model, count in names.items()
        for one in make_rows(seeds=range(count), models=[model], failures=False)
    ]


def drawn(rows):
    results = Results(rows)
    with style_context():
        return pareto(results, Look.of(results, context=512))


def lines_of(drawing) -> list[list[float]]:
    """Horizontal coordinates of the line of each panel, where it has one."""
    found = [line for axes in drawing.figure.axes for line in axes.lines]
    return [list(line.get_xdata()) for line in found if line.get_color() == MUTED]


def words_of(drawing) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in drawing.figure.texts)


def test_the_line_joins_models_of_three_seeds_only(make_rows):
    rows = seeded(make_rows, transformer=3, ham_cosine=2, mamba2=1, gated_delta_rule=3)
    drawing = drawn(rows)
    memory = {
        model: memory_cell(Results(rows), Look.of(Results(rows)), model).value
        for model in ("transformer", "gated-delta-rule")
    }
    assert len(lines_of(drawing)) == 3
    assert all(set(xs) <= set(memory.values()) for xs in lines_of(drawing))
    assert "ham-cosine" not in drawing.note and "mamba2" not in drawing.note
    few = drawn(seeded(make_rows, transformer=2, mamba2=2))
    assert lines_of(few) == [] and "line:" not in words_of(few)
    assert "bits per byte (lower is better): none" in few.note
    assert set(joined({"a": cell(1.0)})) == set()


def test_the_footer_names_models_without_a_number_for_a_panel(make_rows):
    rows = seeded(make_rows, transformer=3, ham_cosine=3, mamba2=3, gated_delta_rule=3)
    whole = drawn(rows)
    assert "without a number" not in words_of(whole)
    lacking = [
        one
        for one in rows
        if (one.model, one.experiment) not in {("mamba2", "memory"), ("gated-delta-rule", "needle")}
    ]
    assert "without a number for every panel: gated-delta-rule and mamba2" in words_of(
        drawn(lacking)
    )
