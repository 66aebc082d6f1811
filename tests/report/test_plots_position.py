"""Loss by position: a few models with a far higher loss do not flatten the others."""

from __future__ import annotations

import pytest

from ham.report.aggregate import Results
from ham.report.plots_base import Look, style_context
from ham.report.plots_position import loss_by_position, zoom_limits

MODELS = ("transformer", "mamba2", "gated-delta-rule", "ham-cosine")


def lifted(rows, model: str, by: float):
    """The rows with the loss of one model raised, further for later positions."""
    return [
        row.model_copy(update={"value": row.value + by * row.x_value / 512})
        if row.model == model and row.x_name == "position" and row.experiment != "memory"
        else row
        for row in rows
    ]


def panels(rows):
    results = Results(rows)
    with style_context():
        figure = loss_by_position(results, Look.of(results, context=512)).figure
    return figure.axes


def names(axes) -> set[str]:
    return {text.get_text() for text in axes.texts}


def test_models_of_one_range_have_one_panel(make_rows):
    (axes,) = panels(make_rows(models=MODELS))
    assert names(axes) == set(MODELS)


def test_one_far_above_gets_a_panel_that_enlarges_the_others(make_rows):
    above, below = panels(lifted(make_rows(models=MODELS), "transformer", 20.0))
    assert names(above) == {"transformer"}
    assert names(below) == set(MODELS) - {"transformer"}
    (low, high), (_, top) = below.get_ylim(), above.get_ylim()
    assert high - low < 0.2 * top
    others = [line for line in below.lines if line.get_color() != "#0072b2" and line.get_marker()]
    shown = [y for line in others if len(line.get_xdata()) == 8 for y in line.get_ydata()]
    assert len(shown) == 24 and low < min(shown) and max(shown) < high


@pytest.mark.parametrize(("models", "found"), [(MODELS, True), (MODELS[:2], False)])
def test_two_models_are_no_majority(make_rows, models, found):
    results = Results(lifted(make_rows(models=models), "transformer", 20.0))
    metric = "position_bits_per_byte"
    lines = {
        model: results.series("language_modelling", metric, model=model, context=512)
        for model in models
    }
    assert (zoom_limits(lines) is not None) == found
