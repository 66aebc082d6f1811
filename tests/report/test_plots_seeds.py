"""Models of one seed beside models of several: hollow, without a bar, and said so."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from ham.report.aggregate import Results
from ham.report.figures import FIGURES
from ham.report.palette import PAPER
from ham.report.plots_base import Look, style_context
from ham.report.plots_seeds import HOLLOW_WORDS, interval_words, mixed_seeds

ALONE, SEVERAL = "gated-delta-rule", "transformer"
NAMES = ("bits_per_byte", "token_classes", "recall", "lm_eval", "needle_tasks", "loss_by_position")


def drawings(rows):
    results = Results(rows)
    with style_context():
        look = Look.of(results, context=512, targets={"ham-cosine": 0.25, "ham-committed": 0.25})
        return {spec.name: spec.draw(results, look) for spec in FIGURES}


@pytest.fixture(scope="module")
def mixed(make_rows):
    rows = make_rows(seeds=(0, 1, 2), models=[SEVERAL, "ham-cosine"], failures=False)
    return drawings(rows + make_rows(models=[ALONE, "ham-committed"], failures=False))


@pytest.fixture(scope="module")
def equal(make_rows):
    return drawings(make_rows(models=[ALONE, SEVERAL, "ham-cosine"], failures=False))


def of_model(figure, model: str, markers: bool):
    color = COLORS[model]
    lines = [
        line for axes in figure.axes for line in axes.lines if to_hex(line.get_color()) == color
    ]
    return [line for line in lines if (line.get_marker() not in ("None", ".", None)) == markers]


COLORS = {ALONE: "#009e73", SEVERAL: "#0072b2", "ham-committed": "#cc79a7", "ham-cosine": "#d55e00"}


def bars(figure, model: str):
    """Plain strokes of two points, as intervals are drawn."""
    return [
        line
        for line in of_model(figure, model, markers=False)
        if len(line.get_xdata()) == 2 and line.get_transform() == line.axes.transData
    ]


def hollow(figure, model: str):
    return [
        line
        for line in of_model(figure, model, markers=True)
        if to_hex(line.get_markerfacecolor()) == PAPER
    ]


def footer(drawing) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in drawing.figure.texts)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_beside_several_is_hollow_and_has_no_bar(mixed, name):
    figure = mixed[name].figure
    assert hollow(figure, ALONE) and not bars(figure, ALONE)
    assert bars(figure, SEVERAL) and not hollow(figure, SEVERAL)
    assert HOLLOW_WORDS in footer(mixed[name])
    assert "n=1 to 3 seeds" in footer(mixed[name])
    assert "bootstrap" not in footer(mixed[name]) and "Wilson" not in footer(mixed[name])


@pytest.mark.parametrize("name", ["dial", "pareto"])
def test_the_dial_and_the_scatter_plot_do_so_too(mixed, name):
    figure = mixed[name].figure
    assert hollow(figure, "ham-committed") and not bars(figure, "ham-committed")
    assert bars(figure, "ham-cosine") and not hollow(figure, "ham-cosine")
    assert HOLLOW_WORDS in footer(mixed[name])


@pytest.mark.parametrize("name", ["bits_per_byte", "recall"])
def test_one_seed_for_all_keeps_the_bars_over_documents(equal, name):
    figure = equal[name].figure
    assert bars(figure, ALONE) and not hollow(figure, ALONE)
    assert HOLLOW_WORDS not in footer(equal[name])


def test_words_name_the_intervals_that_are_drawn(make_rows):
    one, three = (
        Results(make_rows(seeds=seeds, models=[SEVERAL])).series("recall", "accuracy")[0].cell
        for seeds in ((0,), (0, 1, 2))
    )
    assert interval_words([one]) == "bar: 95 % Wilson interval"
    assert interval_words([three]) == "bar: 95 % t interval over seeds"
    assert interval_words([one, three]) == f"bar: 95 % t interval over seeds · {HOLLOW_WORDS}"
    assert interval_words([]) == ""
    assert [mixed_seeds(cells) for cells in ([one], [three], [one, three])] == [False, False, True]
