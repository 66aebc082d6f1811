from __future__ import annotations

import itertools
import math

import pytest
from matplotlib.colors import to_hex

from ham.report.aggregate import Results
from ham.report.figures import FIGURES
from ham.report.palette import PAPER
from ham.report.plots_base import DPI, WIDTH_INCHES, Look, legend_lines, save_svg, style_context
from ham.report.plots_cost import speed_points
from ham.report.plots_labels import spread_out
from ham.report.plots_training import running_mean

NAMES = [spec.name for spec in FIGURES]


def draw(rows, **look):
    results = Results(rows)
    with style_context():
        return {
            spec.name: spec.draw(results, Look.of(results, context=512, **look)) for spec in FIGURES
        }


@pytest.fixture(scope="module")
def drawings(make_rows):
    return draw(make_rows(models=[*ALL, "my-layer"]), smoke=True, targets={"ham-cosine": 0.25})


ALL = (
    "transformer",
    "sliding-window",
    "gated-delta-rule",
    "mamba2",
    "ham-cosine",
    "ham-committed",
)


def texts(figure):
    return [text for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_text()]


def test_every_figure_is_drawn(drawings):
    assert [name for name, drawing in drawings.items() if drawing is None] == []


def test_figures_are_narrow_and_have_words(drawings):
    for drawing in drawings.values():
        assert drawing.figure.get_figwidth() * DPI < 1200
        assert drawing.shown.endswith(".") and drawing.note.endswith(".")
        assert len(drawing.alt) > 40
        assert "smoke run" in " ".join(text.get_text() for text in texts(drawing.figure))


@pytest.mark.parametrize("name", NAMES)
def test_axes_have_units_or_names(drawings, name):
    for axes in drawings[name].figure.axes:
        if axes.get_visible() and axes.get_label() != "<colorbar>":
            labels = axes.get_xlabel() + axes.get_ylabel()
            inner = name.startswith("needle")
            assert labels or inner, f"{name} has a panel without any axis label"


def colors_by_model(figure, models) -> dict[str, set[str]]:
    """Colours of names at line ends and above panels, and of legend entries."""
    found: dict[str, set[str]] = {}
    for legend in figure.legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if text.get_text() in models:
                found.setdefault(text.get_text(), set()).add(to_hex(handle.get_color()))
    for axes in figure.axes:
        for text in [*axes.texts, axes.title, axes._left_title]:
            if text.get_text() in models:
                found.setdefault(text.get_text(), set()).add(to_hex(text.get_color()))
    return found


def test_a_model_has_one_color_in_all_figures(drawings):
    models = {*ALL, "my-layer"}
    seen: dict[str, set[str]] = {}
    for name, drawing in drawings.items():
        found = colors_by_model(drawing.figure, models)
        assert found or name == "bits_per_byte", f"{name} names no model in its colour"
        for model, colors in found.items():
            seen.setdefault(model, set()).update(colors)
    assert set(seen) == models
    assert {model: len(colors) for model, colors in seen.items()} == dict.fromkeys(models, 1)
    assert len({min(colors) for colors in seen.values()}) == len(models)


def test_lines_and_markers_follow_the_palette(drawings, make_rows):
    results = Results(make_rows(models=[*ALL, "my-layer"]))
    look = Look.of(results)
    allowed = {(style.color, style.marker) for style in look.styles.values()}
    for name in ("recall", "throughput", "memory", "loss_by_position", "kv_growth", "dial"):
        for axes in drawings[name].figure.axes:
            drawn = {
                (to_hex(line.get_color()), line.get_marker())
                for line in axes.lines
                if line.get_marker() not in ("None", "none", None, "", "x")
            }
            assert drawn and drawn <= allowed


def test_line_end_labels_do_not_overlap(drawings):
    for name in ("loss_by_position", "recall", "kv_growth", "training_loss", "dial"):
        figure = drawings[name].figure
        renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
        for axes in figure.axes:
            labels = [text for text in axes.texts if text.get_text() in {*ALL, "my-layer"}]
            boxes = [text.get_window_extent(renderer) for text in labels]
            for index, box in enumerate(boxes):
                assert box.x1 <= figure.bbox.x1, f"{name}: {labels[index].get_text()} is cut off"
                assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_failures_are_marked(drawings):
    panels = drawings["throughput"].figure.axes
    crosses = [line for line in panels[2].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[1024.0]]
    assert to_hex(crosses[0].get_color()) == "#56b4e9"
    hatched = [patch for axes in drawings["needle"].figure.axes for patch in axes.patches]
    assert sum(patch.get_hatch() is not None for patch in hatched) == 10


def test_speed_without_an_interval_takes_that_of_the_time(make_rows):
    rows = make_rows(models=["mamba2"])
    none = {"low": None, "high": None, "interval": None}
    rows = [
        row.model_copy(update=none) if row.metric == "tokens_per_second" else row for row in rows
    ]
    points = speed_points(Results(rows), "mamba2", "prefill")
    expected = [
        (1000 * row.x_value / row.high, 1000 * row.x_value / row.low)
        for row in rows
        if row.metric == "prefill_ms"
    ]
    found = [(point.cell.estimate.low, point.cell.estimate.high) for point in points]
    assert found == [pytest.approx(pair) for pair in expected]


def test_values_are_those_of_the_rows(drawings, make_rows):
    (axes,) = drawings["recall"].figure.axes
    expected = [
        row.value
        for row in make_rows()
        if row.experiment == "recall" and row.model == "transformer"
    ]
    lines = [
        line
        for line in axes.lines
        if to_hex(line.get_color()) == "#0072b2" and line.get_marker() == "o"
    ]
    assert list(lines[0].get_ydata()) == expected


def trained_for(rows, model: str, share: float):
    """The rows of an arm that was trained for a share of its own; its loss is 2.5 less that."""
    return [
        row.model_copy(
            update={
                "model": model,
                "value": 2.5 - share - (row.x_value - share),
                "low": None,
                "high": None,
                "interval": None,
            }
        )
        for row in rows
        if row.model == "ham-cosine" and (row.experiment, row.metric) == ("dial", "bits_per_byte")
    ]


def test_the_page_of_the_dial_has_moved_lines_and_trained_points(make_rows):
    rows = make_rows(models=["transformer", "ham-cosine"])
    shares = {"ham-cosine-0.5": 0.5, "ham-cosine-1": 1.0, "ham-cosine-late": 0.75}
    for model, share in shares.items():
        rows += trained_for(rows, model, share)
    page = draw(rows, targets={"ham-cosine": 0.25, **shares})["dial_page"]
    text, needles, recalls, memory, times = page.figure.axes[:5]
    color = Look.of(Results(rows)).styles["ham-cosine"].color
    hollow = [
        line
        for line in text.lines
        if line.get_markerfacecolor() == PAPER and line.get_color() == color
    ]
    points = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in hollow)
    kept = [0.25 * 0.97, 0.5 * 0.97, 0.97]
    assert [x for x, _ in points] == kept, "at its own target; an arm of another kind is no point"
    assert [y for _, y in points[1:]] == [2.0, 1.5]
    for axes, metric in ((needles, "needle_accuracy"), (times, "decode_ms")):
        (line,) = [one for one in axes.lines if len(one.get_xdata()) == 7]
        known = [row for row in rows if (row.experiment, row.metric) == ("dial", metric)]
        assert list(line.get_ydata()) == [row.value for row in known]
        assert list(line.get_xdata()) == [row.kv_fraction for row in known]
    dashed = [line for line in memory.lines if line.get_linestyle() == "--"]
    (whole,) = {line.get_ydata()[0] for line in dashed}
    assert (
        whole
        == Results(rows)
        .cell("memory", "cache_bytes_allocated", model="transformer", task="decode", x=1024)
        .value
    )
    assert recalls.get_ylabel() == "recall accuracy"
    assert "ham-cosine, decoding (ms per token): 3" in page.note


def test_positions_beyond_the_training_context_are_marked(make_rows):
    rows = make_rows(models=["mamba2"])
    longer = [
        row.model_copy(update={"x_value": 4 * row.x_value, "labels": {"context": 2048}})
        for row in rows
        if row.x_name == "position" and row.labels.get("context") == 512
    ]
    figures = {
        name: draw(made)["loss_by_position"]
        for name, made in (("within", rows), ("beyond", rows + longer))
    }
    marks = {
        name: [
            line.get_xdata()[0] for line in one.figure.axes[0].lines if line.get_linestyle() == ":"
        ]
        for name, one in figures.items()
    }
    assert marks == {"within": [], "beyond": [512]}
    assert "the training context, 512 tokens" in figures["beyond"].shown
    old = [row for row in rows if row.metric != "position_bits_per_byte"]
    assert draw(old)["loss_by_position"].figure.axes[0].get_ylabel() == "loss (nats per token)"


def test_missing_rows_give_no_figure(make_rows):
    made = draw(make_rows(models=["transformer", "mamba2"], omit=["train", "memory", "recall"]))
    assert {name for name, drawing in made.items() if drawing is None} == {
        "dial",
        "dial_page",
        "needle_kept",
        "recall",
        "memory",
        "pareto",
        "kv_growth",
        "training_loss",
        "validation_loss",
        "recall_loss",
        "routed_fraction",
        "gates",
    }


def test_nothing_but_failures_gives_no_figure_but_a_reason(make_rows):
    gone = {"value": None, "low": None, "high": None, "interval": None, "error": "E: gone"}
    rows = [row.model_copy(update=gone) for row in make_rows(models=["ham-cosine"])]
    assert set(draw(rows).values()) == {None}
    reasons = {spec.name: spec.missing(Results(rows)) for spec in FIGURES}
    assert reasons["recall"] == "all 4 cells failed, e.g. E: gone"
    assert FIGURES[0].missing(Results([])) == "not run"


def test_three_seeds_are_drawn_thin(make_rows):
    rows = [
        r for r in make_rows(seeds=(0, 1, 2), models=["transformer"]) if r.experiment == "train"
    ]
    axes = draw(rows)["training_loss"].figure.axes[0]
    assert sorted(line.get_linewidth() for line in axes.lines)[:3] == [0.8, 0.8, 0.8]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-9, 1e12])
def test_extreme_values_do_not_break_a_figure(make_rows, value):
    plain = {"value": value, "low": None, "high": None, "interval": None}
    rows = [row.model_copy(update=plain) if row.error is None else row for row in make_rows()]
    assert None not in draw(rows).values()


def test_svg_is_reproducible_and_undated(make_rows):
    rows = [row for row in make_rows() if row.experiment == "recall"]
    with style_context():
        first, second = (save_svg(draw(rows)["recall"].figure) for _ in range(2))
    assert first == second
    assert "<dc:date>" not in first


def test_legend_lines_fit_the_width():
    assert legend_lines(["short"]) == 1
    assert legend_lines(ALL) == 2
    assert legend_lines([]) == 1
    assert WIDTH_INCHES < 8


def test_spread_out():
    assert spread_out([0.1, 0.5], 0.2) == [0.1, 0.5]
    crowded = spread_out([0.0, 0.01, 0.02], 0.1)
    assert crowded[0] == pytest.approx(0.0, abs=1e-3)
    gaps = [after - before for before, after in itertools.pairwise(crowded)]
    assert all(gap == pytest.approx(0.1, abs=1e-3) for gap in gaps)
    assert spread_out([], 0.1) == []


def test_running_mean_by_hand():
    # Window 3: first alone, then (1 + 2 + 6) / 3, (2 + 6 + 1) / 3; at the end (6 + 1) / 2.
    assert running_mean([1.0, 2.0, 6.0, 1.0], 3) == pytest.approx([1.0, 3.0, 3.0, 3.5])
    assert running_mean([5.0, math.pi], 1) == [5.0, math.pi]


def test_the_enlarged_part_of_a_noisy_loss_has_means_only(make_rows):
    rows = make_rows(seeds=(0, 1, 2), models=["transformer", "mamba2"], steps=2000)
    drawings = draw([row for row in rows if row.experiment == "train"])
    whole, last = drawings["training_loss"].figure.axes
    assert any(line.get_linewidth() == 0.8 and len(line.get_xdata()) > 3 for line in whole.lines)
    curves = [line for line in last.lines if line.get_transform() == last.transData]
    assert len(curves) == 2
    assert "right 29 and no single seeds" in " ".join(
        text.get_text() for text in drawings["training_loss"].figure.texts
    )
    # Validation is measured rarely on the same batches: its seeds are shown.
    _, last = drawings["validation_loss"].figure.axes
    assert len([line for line in last.lines if line.get_transform() == last.transData]) == 8


def test_steps_in_a_graph_stand_beside_prefills_that_are_not(make_rows):
    rows = [
        row.model_copy(update={"launch_mode": "cuda_graph", "provider": "triton"})
        if row.experiment == "throughput" and row.task == "decode"
        else row
        for row in make_rows(models=["mamba2"])
    ]
    contexts = {
        task: [point.x for point in speed_points(Results(rows), "mamba2", task)]
        for task in ("prefill", "decode", "train")
    }
    assert contexts["prefill"] and contexts["prefill"] == contexts["decode"] == contexts["train"]


def test_gates_are_lines_over_layers_in_words_and_picture(drawings):
    drawing = drawings["gates"]
    assert "ham-cosine opens attention by 0.300 (layers 0.200 to 0.400)" in drawing.note
    assert "the recurrent memory by 0.700" in drawing.alt
    axes = drawing.figure.axes[0]
    lines = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert [0.7, 0.7] in lines and [0.2, 0.4] in lines
    assert axes.get_ylim() == (0, 1)
