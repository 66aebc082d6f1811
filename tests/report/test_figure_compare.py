"""Two drawings of a figure: what a reader could see counts, how letters are drawn does not."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from ham.report.figure_compare import drawing_versions, png_difference, svg_difference
from ham.report.html import inline_svg
from ham.report.plots_base import save_png, save_svg, style_context

VALUES = (1.0, 2.0, 3.0)


def drawn(values: tuple[float, ...] = VALUES, title: str = "Loss", heat: float = 1.0) -> Figure:
    with style_context():
        figure = Figure(figsize=(4, 3))
        left, right = figure.subplots(1, 2)
        left.plot(values, label="ham")
        left.set_ylim(0, 4)
        left.set_title(title)
        left.legend()
        right.imshow([[0.0, heat], [0.5, 0.2]], vmin=0, vmax=1)
        return figure


def svg(**changes: object) -> str:
    with style_context():
        return save_svg(drawn(**changes))


def png(**changes: object) -> bytes:
    with style_context():
        return save_png(drawn(**changes))


def test_letters_may_be_others_and_words_may_move() -> None:
    one = svg()
    other = one.replace("DejaVuSans-", "Other-").replace("<!-- Loss -->", "<!-- Loss  -->")
    other = re.sub(
        r"(<!-- Loss.*?translate\()([\d.]+)",
        lambda m: f"{m[1]}{float(m[2]) + 2:.4f}",
        other,
        flags=re.DOTALL,
    )
    assert other != one and svg_difference(one, other) is None
    far = re.sub(
        r"(<!-- Loss.*?translate\()([\d.]+)",
        lambda m: f"{m[1]}{float(m[2]) + 9:.4f}",
        one,
        flags=re.DOTALL,
    )
    assert "'text Loss" in svg_difference(one, far)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": (1.0, 2.01, 3.0)}, "points away"),
        ({"values": (1.0, 2.0)}, "against"),
        ({"title": "Lass"}, "'text Loss"),
        ({"heat": 0.0}, "of the pixels differ"),
    ],
)
def test_what_a_reader_sees_counts(changes: dict, words: str) -> None:
    assert words in svg_difference(svg(), svg(**changes))


def test_a_shape_more_counts_on_either_side() -> None:
    less = svg()
    more = less.replace("</svg>", '<path d="M 0 0 L 1 1"/></svg>')
    assert svg_difference(less, more) == svg_difference(more, less) == "only one has 'path M L'"


def test_drawings_of_a_page_are_read_too() -> None:
    one, other = (
        inline_svg(svg(values=values), "loss", "loss", {}) for values in (VALUES, (1.0, 2.5, 3.0))
    )
    assert svg_difference(one, one) is None
    assert "points away" in svg_difference(one, other)


def test_pixels() -> None:
    assert png_difference(png(), png()) is None
    assert png_difference(png(), png(title="Lass")) is None, "letters alone"
    with style_context():
        blank = save_png(Figure(figsize=(4, 3)))
        assert "of the pixels differ" in png_difference(png(), blank)
        figure = drawn()
        figure.set_size_inches(5, 3)
        assert "600 x 450 against 750 x 450 pixels" in png_difference(png(), save_png(figure))


def test_versions_are_those_of_what_draws() -> None:
    assert set(drawing_versions()) == {"freetype", "matplotlib", "pillow"}
