"""Speed and memory at one context: bars, one row a model."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.colors import to_hex

from ham.report.aggregate import Results
from ham.report.plots_base import Look, style_context
from ham.report.plots_cost import memory, throughput

DRAW = {"throughput": throughput, "memory": memory}


def at(rows, *contexts: float):
    """The rows without those of speed and memory at other contexts."""
    return [
        row
        for row in rows
        if row.experiment not in DRAW or row.task == "kv_growth" or row.x_value in contexts
    ]


def drawn(rows, name: str):
    results = Results(rows)
    with style_context():
        return DRAW[name](results, Look.of(results))


@pytest.mark.parametrize("name", DRAW)
def test_one_context_gives_a_bar_for_each_model(make_rows, name):
    results = Results(at(make_rows(), 1024))
    drawing = drawn(results.rows, name)
    first = drawing.figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == results.models
    for axes in drawing.figure.axes:
        spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))
    metric, task = {
        "throughput": ("tokens_per_second", "prefill"),
        "memory": ("cache_bytes_allocated", "decode"),
    }[name]
    widths = {to_hex(bar.get_facecolor()): bar.get_width() for bar in first.patches}
    for model, style in Look.of(results).styles.items():
        assert widths[style.color] == results.cell(name, metric, model=model, task=task).value
    assert "at a context of 1,024 tokens" in drawing.shown
    assert "flat" not in drawing.shown + drawing.note


def test_a_failed_cell_has_a_word_instead_of_a_bar(make_rows):
    training = drawn(at(make_rows(), 1024), "throughput").figure.axes[2]
    assert "failed" in [text.get_text() for text in training.texts]
    assert len(training.patches) == 5


@pytest.mark.parametrize("name", DRAW)
def test_several_contexts_give_lines(make_rows, name):
    drawing = drawn(at(make_rows(), 512, 1024), name)
    assert not drawing.figure.axes[0].patches
    assert "flat line" in drawing.note


def test_the_footer_counts_the_seeds_that_were_measured(make_rows):
    rows = make_rows(seeds=(0, 1, 2), models=["transformer", "mamba2"])
    rows = [row for row in at(rows, 1024) if row.experiment not in DRAW or row.seed == 0]
    for name in DRAW:
        words = " ".join(text.get_text() for text in drawn(rows, name).figure.texts)
        assert "n=1 seed" in words and "3 seeds" not in words
