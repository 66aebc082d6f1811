"""The page: one self-contained HTML file without network access or script libraries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ham.inspect.classes import CLASSES, NEEDLE
from ham.inspect.shares import class_shares, format_number, format_share, kept_share
from ham.inspect.text import TokenText, shown
from ham.inspect.trace import LayerTrace
from ham.inspect.views import LEVELS, View, all_layers_view, layer_view
from ham.report import templates as report_templates
from ham.report.palette import KNOWN_STYLES, on_dark

FOLDER = Path(__file__).parent


def render_failure(title: str, reason: str) -> str:
    """The page of a model that training did not give, which says why."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>What {escape(title)} keeps</title></head>\n<body><h1>What {escape(title)} keeps"
        f"</h1>\n<p>There is no model to inspect: training failed. {escape(reason)}</p></body>"
        "</html>\n"
    )


def render_inspection(
    title: str, source: str, tokens: TokenText, traces: Sequence[LayerTrace]
) -> str:
    """The HTML text of the page.

    Args:
        title: Name of the model.
        source: Where the text comes from, for readers.
        tokens: The text.
        traces: At least one layer; each gets a view, and so do all together where there are more.
    """
    views = [layer_view(tokens, trace) for trace in traces]
    if len(traces) > 1:
        views.append(all_layers_view(tokens, traces))
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    report_style = Path(report_templates.__file__).parent / "style.css"
    style = KNOWN_STYLES["ham-cosine"].color
    return environment.get_template("page.html.j2").render(
        title=title,
        source=source,
        note=tokens.note,
        css=Markup(_read(report_style) + _read(FOLDER / "page.css")),
        script=Markup(_read(FOLDER / "page.js")),
        heat=(style, on_dark(style)),
        views=views,
        levels=LEVELS,
        text=_text_markup(tokens, views[0]),
        data=_data(tokens, views),
        class_rows=[
            (name, count, [format_share(share) for share in shares])
            for name, count, shares in class_shares(tokens.classes_T, traces)
        ],
        layer_rows=[
            (
                trace.layer,
                format_share(kept_share(trace)),
                f"{100 * trace.target:.1f} %",
                format_number(trace.threshold),
            )
            for trace in traces
        ],
        traces=traces,
    )


def _text_markup(tokens: TokenText, view: View) -> Markup:
    """One `span` a piece with the classes of the first view; the script changes them."""
    spans = []
    for index, piece in enumerate(tokens.pieces):
        needle = " n" if tokens.classes_T[piece.start] == NEEDLE else ""
        names = f"h{view.levels[index]} k{view.kept[index]}{needle}"
        spans.append(f'<span class="{names}">{escape(shown(piece.text))}</span>')
    return Markup("".join(spans))


def _data(tokens: TokenText, views: Sequence[View]) -> Markup:
    """What the script needs, as JSON that cannot close its element."""
    values = {
        "classes": CLASSES,
        "start": [piece.start for piece in tokens.pieces],
        "end": [piece.end for piece in tokens.pieces],
        "class": [int(tokens.classes_T[piece.start]) for piece in tokens.pieces],
        "views": {
            view.key: {
                "title": view.title,
                "pattern": view.pattern,
                "levels": "".join(map(str, view.levels)),
                "kept": "".join(map(str, view.kept)),
                "details": view.details,
            }
            for view in views
        },
    }
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
