"""The page: one self-contained HTML file, figures inline as SVG that follow light and dark mode."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ham.report import table_format
from ham.report.aggregate import Cell, Results
from ham.report.palette import GRID, INK, MUTED, PAPER, Style, on_dark
from ham.report.provenance import Manifest, Provenance, cell_command
from ham.report.rows import Row
from ham.report.tables_base import Table

TEMPLATES = Path(__file__).parent / "templates"
# The frame of a figure takes the page's colours; a model keeps its own everywhere.
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}

INSPECTION_CAPTION = (
    "which tokens of a held-out text and of a needle document each layer of one HAM keeps in its "
    "cache, by score, kind of token and position"
)


@dataclass(frozen=True)
class PageFigure:
    """A figure as the page shows it: SVG text, caption lines, text for those who cannot see it."""

    name: str
    title: str
    svg: str
    shown: str
    note: str
    alt: str


@dataclass(frozen=True)
class Page:
    """Everything on the page."""

    title: str
    scale: str | None
    results: Results
    styles: Mapping[str, Style]
    sentences: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    figures: Sequence[PageFigure]
    skipped: Sequence[Mapping[str, str]]
    provenance: Provenance
    manifests: Mapping[str, Manifest]
    config: Mapping[str, Any] | None
    config_name: str
    inspection: str | None = None
    ledger: Table | None = None


def render_page(page: Page) -> str:
    """The HTML text of the page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    smoke = page.scale == "smoke"
    comparison = page.tables[0]
    headline = comparison.only(comparison.headline)

    def command(cell: Cell) -> str:
        return cell_command(cell, page.manifests, page.config_name)

    return environment.get_template("page.html.j2").render(
        title=page.title,
        lede=_lede(page),
        scale=page.scale,
        smoke=smoke,
        css=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        sentences=[(topic, _unbroken(text)) for topic, text in page.sentences],
        chips={model: color_variable(style) for model, style in page.styles.items()},
        colors={color_variable(s): (s.color, on_dark(s.color)) for s in page.styles.values()},
        headline=headline,
        headline_rows=table_format.html_rows(headline, command),
        headline_note=table_format.caption_notes(headline, smoke),
        figures=[
            {
                "name": figure.name,
                "title": figure.title,
                "shown": _unbroken(figure.shown),
                "note": _unbroken(figure.note),
                "svg": inline_svg(figure.svg, figure.name, figure.alt, page.styles),
            }
            for figure in page.figures
        ],
        tables=[
            {
                "table": table,
                "rows": table_format.html_rows(table, command),
                "notes": table_format.caption_notes(table, smoke),
            }
            for table in page.tables
        ],
        ledger=page.ledger and page.ledger.only(page.ledger.headline),
        ledger_rows=_ledger_rows(page.ledger),
        inspection=page.inspection,
        inspection_caption=INSPECTION_CAPTION,
        failures=failure_lines(page.results.failures()),
        failed_count=len(page.results.failures()),
        skipped=page.skipped,
        provenance=page.provenance,
        config_text=_config_text(page.config),
        row_count=f"{len(page.results.rows):,}",
    )


def _ledger_rows(ledger: Table | None) -> list[list[table_format.HtmlEntry]]:
    """The lines of the ledger; sentences may break, and point at what recomputes them."""
    if ledger is None:
        return []
    rows = table_format.html_rows(ledger.only(ledger.headline))
    return [
        [
            replace(entry, kind="text wrap" if " " in entry.main else entry.kind, tip=tip)
            for entry in row
        ]
        for row, tip in zip(rows, (str(one["command"]) for one in ledger.records), strict=True)
    ]


def inline_svg(svg: str, prefix: str, alt: str, styles: Mapping[str, Style]) -> Markup:
    """An SVG file as an element of the page.

    The prologue, name spaces and the fixed size go; ids get a prefix, because those of several
    figures would clash; the colours of the frame and of the models become variables of the page.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", head)
    rest = rest.replace("xlink:href=", "href=")
    rest = _prefix_ids(rest, prefix)
    rest = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", rest)
    rest = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', rest)
    models = {style.color: f"var({color_variable(style)})" for style in styles.values()}
    for color, variable in {**THEME, **models}.items():
        rest = rest.replace(color, variable)
    label = f'role="img" aria-label="{escape(alt)}"'
    return Markup(f"{head} {label}>{rest.strip()}")


def _prefix_ids(svg: str, prefix: str) -> str:
    """Prefix every id; matplotlib gives equal pictures equal ids, so later ones get a number."""
    seen: Counter[str] = Counter()

    def rename(match: re.Match[str]) -> str:
        name = match[1]
        seen[name] += 1
        number = "" if seen[name] == 1 else f"-{seen[name]}"
        return f'id="{prefix}-{name}{number}"'

    return re.sub(r'\bid="([^"]+)"', rename, svg)


def color_variable(style: Style) -> str:
    """The name of the page's variable that holds a model's colour."""
    return f"--model-{style.color.removeprefix('#')}"


MANY_EXPERIMENTS = 3


def failure_lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Failed rows for readers: one line for the same reason at several coordinates or seeds.

    A reason that failed a model in three experiments or more is one line for all of them: such a
    model could not be built.
    """
    experiments: dict[tuple, dict[str, None]] = {}
    for row in rows:
        experiments.setdefault((row.model, row.error), {})[row.experiment] = None
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        failed = tuple(experiments[row.model, row.error])
        number = ", ".join(filter(None, (row.metric, row.task)))
        if len(failed) < MANY_EXPERIMENTS:
            failed = (row.experiment,)
        else:
            number = ""
        key = (row.model, failed, number, row.error)
        groups.setdefault(key, []).append(row)
    return [
        {
            "model": model,
            "experiment": ", ".join(failed).replace("_", " "),
            "number": number or f"{len(group)} numbers",
            "where": _where(group) if number else _seeds(group),
            "error": error or "",
        }
        for (model, failed, number, error), group in groups.items()
    ]


def _seeds(rows: Sequence[Row]) -> str:
    return "seed " + ", ".join(dict.fromkeys(str(row.seed) for row in rows))


def _where(rows: Sequence[Row]) -> str:
    """Coordinates and seeds of failed rows, each value once."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.x_name is not None and row.x_value is not None:
            values.setdefault(row.x_name, {})[f"{row.x_value:,g}"] = None
        for name, value in sorted(row.labels.items()):
            values.setdefault(name, {})[str(value)] = None
        if row.seed is not None:
            values.setdefault("seed", {})[str(row.seed)] = None
    return "; ".join(f"{name} {', '.join(listed)}" for name, listed in values.items())


def _unbroken(text: str) -> str:
    """Numbers stay on one line with their percent sign."""
    return text.replace(" %", "\u00a0%")


def _lede(page: Page) -> str:
    names = f"configuration {page.config_name}" if page.config else "no configuration given"
    failed = len(page.results.failures())
    models = page.results.reported_models or page.results.models
    return (
        f"{names} · {len(models)} models · {len(page.results.rows):,} result rows · {failed} failed"
    )


def _config_text(config: Mapping[str, Any] | None) -> str:
    if not config:
        return ""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
